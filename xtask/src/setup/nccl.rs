//! `libvora_nccl.so`, by which GPUs send each other tensors: built against the headers of CUDA and NCCL, without nvcc.

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use super::home;
use super::wheels::{self, Pip};
use crate::cmd;

const LIBRARY: &str = "libvora_nccl.so";

/// Its source, in the clone.
const FOLDER: &str = "crates/vora-torch/csrc/dist";
const SOURCES: [&str; 2] = ["nccl.cpp", "nccl.h"];

/// Builds the library into the view of `home`, where vora-torch looks for it, unless it is there, made of the same source. Headers
/// that `home` lacks are taken from `given`'s folder or fetched.
pub fn build(home: &Path, given: Option<&Path>, pip: &Pip) -> Result<()> {
    let folder = cmd::root().join(FOLDER);
    let mut made_of = Sha256::new();
    for source in SOURCES {
        let source = folder.join(source);
        made_of.update(fs::read(&source).with_context(|| format!("cannot read {}", source.display()))?);
    }
    let made_of: String = made_of.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let (library, note) = (home.join("view/lib").join(LIBRARY), home.join("view/nccl-source"));
    if library.exists() && fs::read_to_string(&note).is_ok_and(|noted| noted.trim() == made_of) {
        return Ok(());
    }
    let nccl = home.join("nvidia/nccl/include");
    ensure!(
        nccl.join("nccl.h").exists(),
        "there is no {}: a libtorch that pip installed has it beside torch/",
        nccl.join("nccl.h").display()
    );
    let scratch = tempfile::tempdir_in(home).with_context(|| format!("cannot write into {}", home.display()))?;
    let pins = wheels::pins(include_str!("pinned-nccl.txt"));
    for wheel in wheels::collect(&pins, given, &scratch.path().join("wheels"), pip)? {
        home::unpack(&wheel, scratch.path(), |name| name.starts_with("nvidia/"))
            .with_context(|| format!("unpacking {}", wheel.display()))?;
    }
    let built = scratch.path().join(LIBRARY);
    let (torch, cuda) = (home.join("torch/include"), "nvidia/cu13/include");
    let mut compiler = Command::new(env::var_os("CXX").unwrap_or_else(|| "c++".into()));
    compiler.args(["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fvisibility=hidden"]);
    for include in [torch.join("torch/csrc/api/include"), torch, home.join(cuda), nccl, scratch.path().join(cuda)] {
        compiler.arg("-I").arg(include);
    }
    // What it calls of libtorch, CUDA and NCCL is there when it is opened, from the libraries that the program has.
    compiler.arg(folder.join(SOURCES[0])).arg("-o").arg(&built);
    eprintln!("compiling {LIBRARY}");
    let output = compiler.output().context("cannot run the C++ compiler")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let first = said.lines().find(|line| line.contains("error")).unwrap_or("it gave no reason");
        bail!("the C++ compiler failed: {first}");
    }
    fs::rename(&built, &library).with_context(|| format!("cannot make {}", library.display()))?;
    fs::write(&note, made_of).with_context(|| format!("cannot write {}", note.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_libtorch_without_nccl_is_told() {
        let home = tempfile::tempdir().unwrap();
        let error = build(home.path(), None, &Pip::default()).unwrap_err().to_string();
        assert!(error.contains("nvidia/nccl/include/nccl.h: a libtorch that pip installed has it"), "{error}");
    }

    #[test]
    fn headers_are_pinned_and_taken_from_beside_the_given_wheel() {
        let pins = wheels::pins(include_str!("pinned-nccl.txt"));
        assert_eq!(pins.len(), 2);
        let (home, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(home.path().join("nvidia/nccl/include")).unwrap();
        fs::write(home.path().join("nvidia/nccl/include/nccl.h"), "").unwrap();
        let wheel = theirs.path().join("nvidia_cuda_cccl-13.0.85-py3-none-any.whl");
        fs::write(&wheel, "not what was pinned").unwrap();
        let error =
            build(home.path(), Some(&theirs.path().join("torch.whl")), &Pip::default()).unwrap_err().to_string();
        assert!(error.contains("nvidia_cuda_cccl-13.0.85") && error.ends_with("it is refused"), "{error}");
        assert!(!home.path().join("view").exists());
    }
}
