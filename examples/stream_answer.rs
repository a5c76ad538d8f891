//! An answer as it is written, about a picture or without one.
//!
//! ```sh
//! cargo run -p vora-examples --bin stream_answer -- MODEL_FOLDER "What is in the picture?" [PICTURE]
//! ```

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use vora_image::open_image;
use vora_infer::tch::{Device, Kind};
use vora_infer::{Assistant, Request};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let usage = "usage: stream_answer MODEL_FOLDER QUESTION [PICTURE]";
    let (folder, question) = (args.next().context(usage)?, args.next().context(usage)?);
    let pictures = args.map(|path| open_image(Path::new(&path))).collect::<Result<Vec<_>>>()?;

    // What a run's folder was trained on lies where it was: its names are taken for folders here.
    let resolve = |name: &str| Ok(PathBuf::from(name));
    let assistant = Assistant::open(Path::new(&folder), Device::Cpu, Kind::Float, &resolve)?;
    let request = Request::question(&pictures, &question).with_max_new_tokens(64);
    let answer = assistant.reply(&request, |text| {
        print!("{text}");
        std::io::stdout().flush().is_ok() // false ends the answer
    })?;
    println!("\n({} tokens)", answer.generated.ids.len());
    Ok(())
}
