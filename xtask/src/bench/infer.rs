//! `cargo xtask bench peers --infer`: answers beside transformers' and llama.cpp's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::example;
use crate::cmd::{self, Vora};
use crate::{download, fixtures, setup, train};

/// llama.cpp, built for this machine, with what its package needs beside the fixtures' environment.
const PACKAGES: [&str; 2] = ["llama-cpp-python==0.3.36", "diskcache==5.6.3"];

/// The kinds of GGUF file that llama.cpp gets.
const KINDS: [&str; 3] = ["bf16", "q8_0", "q4_0"];

/// Runs `benches/examples/infer.rs` over the default recipe's language model, which goes to llama.cpp as GGUF files, and `engine.rs`
/// behind it.
pub fn run(args: &[String]) -> Result<()> {
    setup::ensure()?;
    let (llm, python) = (download::ensure(train::DEFAULT_MODELS[0])?, fixtures::python()?);
    let packages = packages(&python)?;
    let out = cmd::root().join("runs/bench-infer");
    let (vora, mut files) = (Vora::build()?, Vec::new());
    for kind in KINDS {
        let folder = out.join(format!("gguf-{kind}"));
        let file = folder.join("model.gguf");
        if !file.exists() {
            cmd::run(vora.command("convert").arg(&llm).arg(&folder).args(["--to", "gguf", "--dtype", kind]))?;
        }
        files.push(format!("{kind}={}", file.display()));
    }
    let mut peers = example("infer");
    peers.arg("--llm").arg(&llm).arg("--gguf").arg(files.join(",")).arg("--python").arg(python);
    peers.arg("--script").arg(cmd::root().join("benches/infer.py")).arg("--out").arg(&out);
    peers.arg("--text").arg(cmd::root().join("crates/vora-eval/src/language/prose.md"));
    cmd::run(peers.env("PYTHONPATH", packages).args(args))?;
    let model = out.join("model-bf16");
    let mut own = example("engine");
    own.arg("--model").arg(model).arg("--llm").arg(llm).arg("--out").arg(out).env("OMP_NUM_THREADS", "1");
    cmd::run(&mut own)
}

/// A folder of the packages, built in the cache folder for the first run, which takes some minutes.
fn packages(python: &Path) -> Result<PathBuf> {
    let folder = cmd::cache()?.join("llama-cpp");
    let installed = folder.join("installed.txt"); // written last: with it the folder is complete
    let wanted = PACKAGES.join("\n");
    if fs::read_to_string(&installed).is_ok_and(|installed| installed == wanted) {
        return Ok(folder);
    }
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--no-deps", "--upgrade", "--target"]).arg(&folder).args(PACKAGES);
    cmd::run(&mut pip).context("llama.cpp is built from its source: that takes a C++ compiler")?;
    fs::write(&installed, wanted).with_context(|| format!("cannot write {}", installed.display()))?;
    Ok(folder)
}
