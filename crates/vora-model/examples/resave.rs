//! `resave FOLDER OUT` opens a model folder of any kind in f32 and writes it again, for another program to read
//! (`fixtures/check_llava.py`).

use std::path::Path;

use anyhow::{Result, bail};
use tch::{Device, Kind};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, out] = arguments.as_slice() else { bail!("usage: resave FOLDER OUT") };
    let resolve = |name: &str| Ok(name.into());
    vora_model::open(Path::new(folder), Device::Cpu, Kind::Float, &resolve)?.save(Path::new(out))
}
