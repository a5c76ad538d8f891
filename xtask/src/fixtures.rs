//! `cargo xtask fixtures`: rebuilds the golden tensors in a Python environment of their own, or writes the table of how
//! close to them everything is.

pub mod table;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cmd;

const EXAMPLES: &str = "\
Examples:
  cargo xtask fixtures                 run every script of fixtures/generate
  cargo xtask fixtures attention       fixtures/generate/attention.py -> fixtures/golden/attention.safetensors
  cargo xtask fixtures --table         run every test; the table in fixtures/README.md says what was compared";

/// Arguments of `fixtures`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Scripts to run, without `.py`; all of them by default
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Run every test instead, and write the largest differences into fixtures/README.md
    #[arg(long, conflicts_with = "names")]
    table: bool,
}

/// Runs the scripts, one after another, in the clone.
pub fn run(args: &Args) -> Result<()> {
    if args.table {
        return table::write();
    }
    let generate = cmd::root().join("fixtures/generate");
    let scripts = scripts(&generate, &args.names)?;
    let python = python()?;
    for script in scripts {
        cmd::run(Command::new(&python).arg(&script).current_dir(cmd::root()))?;
    }
    Ok(())
}

/// The Python that fixtures, and what is compared with Python, are made with.
pub fn python() -> Result<PathBuf> {
    environment("fixtures-python", &REQUIREMENTS.map(|name| cmd::root().join("fixtures/generate").join(name)))
}

/// The scripts of these names in a folder, or all; a name that starts with `_` is a module that scripts share.
pub fn scripts(folder: &Path, names: &[String]) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        if path.extension().is_some_and(|extension| extension == "py") && !stem.starts_with('_') {
            all.push((stem.to_owned(), path));
        }
    }
    all.sort();
    let known = all.iter().map(|(stem, _)| stem.as_str()).collect::<Vec<_>>().join(", ");
    for name in names {
        let found = all.iter().any(|(stem, _)| stem == name);
        ensure!(found, "no script `{name}.py` in {}; it has {known}", cmd::shown(folder));
    }
    all.retain(|(stem, _)| names.is_empty() || names.contains(stem));
    Ok(all.into_iter().map(|(_, path)| path).collect())
}

/// What the scripts import.
const REQUIREMENTS: [&str; 2] = ["requirements.txt", "requirements-no-deps.txt"];

/// The Python of a virtual environment with these requirements, in a folder of this name in the cache folder; made anew when
/// they change. A list whose name ends with `no-deps` is installed without what its packages ask for.
///
/// # Errors
/// Where Python has no `venv`, and where a package cannot be installed.
pub fn environment(name: &str, lists: &[PathBuf]) -> Result<PathBuf> {
    let mut wanted = Vec::new();
    for list in lists {
        wanted.extend(fs::read(list).with_context(|| format!("cannot read {}", list.display()))?);
    }
    let folder = cmd::cache()?.join(name);
    let python = folder.join("bin/python");
    let installed = folder.join("requirements.txt"); // written last: with it the environment is complete
    if fs::read(&installed).is_ok_and(|installed| installed == wanted) {
        return Ok(python);
    }
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    cmd::run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&folder)).context(
        "cannot make a virtual environment (Python 3.11 or later; `apt install python3-venv` where it is apart)",
    )?;
    for list in lists {
        let alone = list.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("no-deps"));
        let pip = ["-m", "pip", "install"].into_iter().chain(alone.then_some("--no-deps"));
        cmd::run(Command::new(&python).args(pip).arg("--requirement").arg(list))?;
    }
    fs::write(&installed, wanted).with_context(|| format!("cannot write {}", installed.display()))?;
    Ok(python)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_are_found_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.py", "a.py", "_shared.py", "requirements.txt"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(scripts(dir.path(), &[]).unwrap(), [dir.path().join("a.py"), dir.path().join("b.py")]);
        assert_eq!(scripts(dir.path(), &["b".into()]).unwrap(), [dir.path().join("b.py")]);
        let err = scripts(dir.path(), &["c".into()]).unwrap_err().to_string();
        assert_eq!(err, format!("no script `c.py` in {}; it has a, b", dir.path().display()));
    }
}
