//! The wheels that hold libtorch: pinned by version and sha256, found on this machine or fetched with pip.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

/// What to do when a wheel cannot be had, for the end of an error line.
const INSTEAD: &str =
    "give a wheel that you have (`cargo xtask setup --wheel FILE`) or set LIBTORCH to a libtorch 2.11.0";

/// pip takes each of these tags literally, so all that the pinned wheels have are listed.
const PLATFORMS: [&str; 6] =
    ["manylinux_2_28", "manylinux_2_27", "manylinux_2_25", "manylinux_2_18", "manylinux_2_17", "manylinux2014"];

/// One wheel: a line of `pinned-*.txt`.
#[derive(Debug)]
pub struct Pin {
    line: String, // what pip reads
    name: String,
    version: String,
    sha256: Vec<String>, // any of these
}

/// Reads the lines of a pip requirements file with hashes.
pub fn pins(requirements: &str) -> Vec<Pin> {
    requirements.lines().filter(|line| !line.starts_with('#')).filter_map(Pin::parse).collect()
}

impl Pin {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let (name, version) = words.next()?.split_once("==")?;
        let sha256 = words.filter_map(|word| word.strip_prefix("--hash=sha256:")).map(str::to_owned).collect();
        Some(Self { line: line.to_owned(), name: name.to_owned(), version: version.to_owned(), sha256 })
    }

    /// Whether a file of this name is a wheel of this package and version.
    fn names(&self, file: &Path) -> bool {
        let start = format!("{}-{}-", self.name.replace('-', "_"), self.version);
        file.file_name()
            .and_then(|name| name.to_str())
            .is_some_and(|name| name.starts_with(&start) && name.ends_with(".whl"))
    }

    /// Refuses a file with another sha256 than the pinned ones.
    fn verify(&self, file: &Path) -> Result<()> {
        let found = sha256(file).with_context(|| format!("cannot read {}", file.display()))?;
        ensure!(
            self.sha256.contains(&found),
            "{} has sha256 {found}, which is not that of {} {} for Linux x86_64; it is refused",
            file.display(),
            self.name,
            self.version
        );
        Ok(())
    }
}

/// The verified file of every pin: `given` for torch, else one that lies beside it or in `dir` already, else fetched
/// into `dir`.
pub fn collect(pins: &[Pin], given: Option<&Path>, dir: &Path, pip: &Pip) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let mut files = Vec::new();
    for (i, pin) in pins.iter().enumerate() {
        let file = match given {
            Some(wheel) if pin.name == "torch" => wheel.to_owned(),
            _ => match beside(pin, given)? {
                Some(file) => file,
                None => {
                    eprintln!("[{}/{}] {} {}", i + 1, pins.len(), pin.name, pin.version);
                    files.push(fetch(pin, dir, pip)?);
                    continue;
                }
            },
        };
        pin.verify(&file)?;
        files.push(file);
    }
    Ok(files)
}

/// A wheel of this pin in the folder of the wheel that the user gave.
fn beside(pin: &Pin, given: Option<&Path>) -> Result<Option<PathBuf>> {
    match given {
        Some(wheel) => find(pin, &std::path::absolute(wheel)?.with_file_name("")),
        None => Ok(None),
    }
}

/// Fetches into `dir`, unless an earlier, interrupted setup already did.
fn fetch(pin: &Pin, dir: &Path, pip: &Pip) -> Result<PathBuf> {
    if let Some(file) = find(pin, dir)? {
        if pin.verify(&file).is_ok() {
            return Ok(file);
        }
        fs::remove_file(&file).with_context(|| format!("removing {}", file.display()))?;
    }
    pip.download(pin, dir)?;
    let file = find(pin, dir)?.with_context(|| format!("pip left no wheel of {} in {}", pin.name, dir.display()))?;
    pin.verify(&file)?;
    Ok(file)
}

fn find(pin: &Pin, dir: &Path) -> Result<Option<PathBuf>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).find(|path| pin.names(path)))
}

fn sha256(file: &Path) -> io::Result<String> {
    let (mut file, mut hash, mut buffer) = (File::open(file)?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// The machine's pip, with the user's index, proxy and certificate settings.
#[derive(Debug)]
pub struct Pip {
    python: OsString,
}

impl Default for Pip {
    fn default() -> Self {
        Self { python: "python3".into() }
    }
}

impl Pip {
    /// Fetches one wheel into `dir`; pip checks the hash too. Progress goes to stderr, what pip has to say into the error.
    fn download(&self, pin: &Pin, dir: &Path) -> Result<()> {
        let requirements = dir.join("requirements.txt");
        fs::write(&requirements, &pin.line).with_context(|| format!("cannot write {}", requirements.display()))?;
        let mut pip = Command::new(&self.python);
        pip.args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input"]);
        pip.args(["--disable-pip-version-check", "--implementation", "cp", "--python-version", "3.11"]);
        for platform in PLATFORMS {
            pip.arg("--platform").arg(format!("{platform}_x86_64"));
        }
        pip.arg("--require-hashes").arg("--requirement").arg(&requirements).arg("--dest").arg(dir);
        // pip assembles files in TMPDIR, which may be a small memory disk.
        let output = pip.env("TMPDIR", dir).stdout(Stdio::from(io::stderr())).stderr(Stdio::piped()).spawn();
        let output = match output {
            Ok(child) => child.wait_with_output().context("waiting for pip")?,
            Err(err) if err.kind() == ErrorKind::NotFound => {
                bail!("python3 is not on PATH, and pip fetches libtorch; install Python 3 with pip, {INSTEAD}")
            }
            Err(err) => return Err(err).context("cannot run python3"),
        };
        if output.status.success() {
            return Ok(());
        }
        bail!("{}", explain(pin, &String::from_utf8_lossy(&output.stderr)))
    }

    /// A pip that is this shell script, written into `dir`.
    #[cfg(test)]
    pub fn fake(dir: &Path, script: &str) -> Self {
        use std::os::unix::fs::PermissionsExt as _;
        let python = dir.join("python3");
        fs::write(&python, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
        Self { python: python.into() }
    }
}

/// One line out of what pip wrote when it failed.
fn explain(pin: &Pin, stderr: &str) -> String {
    let Pin { name, version, .. } = pin;
    let has = |words: &[&str]| words.iter().any(|word| stderr.contains(word));
    if has(&["No module named pip"]) {
        return format!(
            "python3 has no pip, which fetches libtorch; install it (`apt install python3-pip`), {INSTEAD}"
        );
    }
    if has(&["DO NOT MATCH THE HASHES"]) {
        return format!(
            "{name} {version} from the package index has a wrong sha256 and is refused; try again, {INSTEAD}"
        );
    }
    if has(&["Retrying (", "NewConnectionError", "ProxyError", "SSLError", "timed out", "Temporary failure"]) {
        return format!(
            "cannot fetch {name} {version}: the package index cannot be reached; connect and try again, {INSTEAD}"
        );
    }
    let last = stderr.lines().rev().find(|line| line.starts_with("ERROR: ")).unwrap_or("ERROR: it gave no reason");
    format!("cannot fetch {name} {version}: pip: {}; {INSTEAD}", &last["ERROR: ".len()..])
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "a-b==1.2 --hash=sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"; // of "hello"
    const FILE: &str = "a_b-1.2-py3-none-any.whl";

    #[test]
    fn pinned_lists_are_whole() {
        let cpu = pins(include_str!("pinned-cpu.txt"));
        let cuda = pins(include_str!("pinned-cuda.txt"));
        assert_eq!((cpu.len(), cuda.len()), (3, 13));
        assert_eq!((cpu[0].name.as_str(), cpu[0].version.as_str()), ("torch", crate::setup::VERSION));
        for pin in cpu.iter().chain(&cuda) {
            assert!(!pin.sha256.is_empty() && pin.sha256.iter().all(|hash| hash.len() == 64), "{pin:?}");
        }
    }

    #[test]
    fn wheel_is_known_by_its_name() {
        let pin = &pins(LINE)[0];
        assert!(pin.names(Path::new("/x/a_b-1.2-py3-none-any.whl")));
        assert!(!pin.names(Path::new("/x/a_b-1.20-py3-none-any.whl")));
        assert!(!pin.names(Path::new("/x/a_b_c-1.2-py3-none-any.whl")));
    }

    #[test]
    fn broken_wheel_of_an_earlier_run_is_fetched_again() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(FILE), "hel").unwrap();
        let pip = Pip::fake(dir.path(), &format!("printf hello > {}", dir.path().join(FILE).display()));
        let files = collect(&pins(LINE), None, dir.path(), &pip).unwrap();
        assert_eq!(fs::read_to_string(&files[0]).unwrap(), "hello");
        // and a whole one is not
        collect(&pins(LINE), None, dir.path(), &Pip::fake(dir.path(), "exit 1")).unwrap();
    }

    #[test]
    fn wheels_beside_the_given_one_are_used() {
        let (dir, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(theirs.path().join("torch.whl"), "hello").unwrap();
        fs::write(theirs.path().join(FILE), "hello").unwrap();
        let pins = pins(&format!("{}\n{LINE}", LINE.replace("a-b", "torch")));
        let pip = Pip::fake(dir.path(), "exit 1");
        let files = collect(&pins, Some(&theirs.path().join("torch.whl")), dir.path(), &pip).unwrap();
        assert_eq!(files, [theirs.path().join("torch.whl"), theirs.path().join(FILE)]);
    }

    #[test]
    fn wrong_content_from_pip_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let pip = Pip::fake(dir.path(), &format!("printf bye > {}", dir.path().join(FILE).display()));
        let err = collect(&pins(LINE), None, dir.path(), &pip).unwrap_err().to_string();
        assert!(err.contains("which is not that of a-b 1.2") && err.ends_with("it is refused"), "{err}");
    }

    #[test]
    fn pips_failures_become_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let error = |script: &str| {
            let pip = Pip::fake(dir.path(), &format!("{script}\nexit 1"));
            let err = format!("{:#}", collect(&pins(LINE), None, dir.path(), &pip).unwrap_err());
            assert!(err.contains("--wheel") && err.contains("LIBTORCH") && !err.contains('\n'), "{err}");
            err
        };
        assert!(error("echo \"$0: No module named pip\" >&2").starts_with("python3 has no pip"));
        assert!(error("echo 'ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM' >&2").contains("wrong sha256"));
        assert!(error("echo 'NewConnectionError' >&2").contains("cannot be reached"));
        let other = error("echo 'ERROR: first' >&2; echo 'ERROR: No space left on device' >&2; echo hint >&2");
        assert!(other.starts_with("cannot fetch a-b 1.2: pip: No space left on device; "), "{other}");
        let none = Pip { python: dir.path().join("nowhere").into() };
        let err = collect(&pins(LINE), None, dir.path(), &none).unwrap_err().to_string();
        assert!(err.starts_with("python3 is not on PATH"), "{err}");
    }
}
