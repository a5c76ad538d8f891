//! Where things lie, and how tasks run other programs.

use std::collections::HashMap;
use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result};
use signal_hook::consts::SIGINT;

/// The folder of this clone.
pub fn root() -> PathBuf {
    let manifest = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&manifest).parent().expect("xtask/ lies in the clone").to_owned()
}

/// `vora/` in the user's cache folder; every clone shares it.
pub fn cache() -> Result<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
    Ok(cache.context("no cache folder: set HOME or XDG_CACHE_HOME")?.join("vora"))
}

/// A path as one would type it in the clone.
pub fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// Whether a program of this name lies on PATH.
pub fn on_path(program: impl AsRef<Path>) -> bool {
    env::split_paths(&env::var_os("PATH").unwrap_or_default()).any(|dir| dir.join(program.as_ref()).is_file())
}

/// cargo, run in the clone just as a person would run it there.
pub fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // Everything is built against `.libtorch`, which `.cargo/config.toml` names. The LIBTORCH of a user was linked there
    // by `setup`; left in the environment it would make cargo build torch-sys and tch a second time.
    cargo.current_dir(root()).env_remove("LIBTORCH");
    cargo
}

/// The program `vora`.
#[derive(Debug)]
pub struct Vora {
    /// Where cargo put it.
    pub program: PathBuf,
}

impl Vora {
    /// Builds it in release, from the same packages as a plain `cargo run --release`: that would else build tch again.
    pub fn build() -> Result<Self> {
        let mut build = cargo();
        build.args(["build", "--release", "--locked", "--bin", "vora"]);
        let program = programs(&mut build)?.remove("vora").context("cargo built no program `vora`")?;
        // From here on Ctrl-C is for vora alone, which saves a checkpoint first; we end when it does, with its code.
        signal_hook::flag::register(SIGINT, Arc::default()).context("cannot handle SIGINT")?;
        Ok(Self { program })
    }

    /// `vora SUBCOMMAND`, run in the clone; it finds libtorch wherever cargo's target folder lies.
    pub fn command(&self, subcommand: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.current_dir(root()).arg(subcommand);
        let rest = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let rest = env::split_paths(&rest).filter(|path| !path.as_os_str().is_empty()); // an empty one means `.`
        let paths = std::iter::once(root().join(".libtorch/lib")).chain(rest);
        if let Ok(paths) = env::join_paths(paths) {
            command.env("LD_LIBRARY_PATH", paths);
        }
        command
    }
}

/// Runs a `cargo build`, and gives the programs that it built, by their names.
///
/// # Errors
/// [`ChildFailed`] when it ends with anything but 0.
pub fn programs(build: &mut Command) -> Result<HashMap<String, PathBuf>> {
    announce(build);
    build.arg("--message-format=json-render-diagnostics").stderr(Stdio::inherit());
    let output = build.output().context("cannot run cargo")?;
    if !output.status.success() {
        return Err(ChildFailed::new(build, output.status).into());
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter_map(executable).collect())
}

/// Name and path in one of cargo's JSON messages, if it tells of a program.
fn executable(message: &str) -> Option<(String, PathBuf)> {
    let message: serde_json::Value = serde_json::from_str(message).ok()?;
    let path: PathBuf = message.get("executable")?.as_str()?.into();
    Some((message.get("target")?.get("name")?.as_str()?.to_owned(), path))
}

/// Shows a command, runs it, and waits until it ends.
///
/// # Errors
/// [`ChildFailed`] when it ends with anything but 0.
pub fn run(command: &mut Command) -> Result<()> {
    announce(command);
    let status = command.status().with_context(|| format!("cannot run `{}`", line(command)))?;
    if status.success() { Ok(()) } else { Err(ChildFailed::new(command, status).into()) }
}

fn announce(command: &Command) {
    eprintln!("$ {}", line(command));
    let _ = std::io::stderr().flush();
}

/// The command as one would type it in the clone.
fn line(command: &Command) -> String {
    let word = |word: &OsStr| shown(Path::new(word));
    let program = Path::new(command.get_program());
    let name = if program.ends_with("cargo") { "cargo".to_owned() } else { word(program.as_os_str()) };
    std::iter::once(name).chain(command.get_args().map(word)).collect::<Vec<_>>().join(" ")
}

/// A program that a task ran and that failed; the task exits with the same code.
#[derive(Debug)]
pub struct ChildFailed {
    line: String,
    status: ExitStatus,
}

impl ChildFailed {
    fn new(command: &Command, status: ExitStatus) -> Self {
        Self { line: line(command), status }
    }

    /// The exit code of the program, or 1 where a signal ended it.
    pub fn code(&self) -> u8 {
        self.status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
    }
}

impl fmt::Display for ChildFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` failed ({})", self.line, self.status)
    }
}

impl std::error::Error for ChildFailed {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_child_passes_its_code_on() {
        let err = run(Command::new("sh").args(["-c", "exit 7"])).unwrap_err();
        assert_eq!(err.to_string(), "`sh -c exit 7` failed (exit status: 7)");
        assert_eq!(err.downcast_ref::<ChildFailed>().unwrap().code(), 7);
    }

    #[test]
    fn missing_program_is_named() {
        let err = run(&mut Command::new("no-such-program")).unwrap_err();
        assert!(format!("{err:#}").starts_with("cannot run `no-such-program`: "), "{err:#}");
    }

    #[test]
    fn program_is_read_from_cargos_messages() {
        let messages = [
            r#"{"reason":"compiler-artifact","executable":null}"#,
            "not json",
            r#"{"executable":"/t/vora","target":{"name":"vora"}}"#,
        ];
        let found: Vec<_> = messages.iter().filter_map(|message| executable(message)).collect();
        assert_eq!(found, [("vora".to_owned(), PathBuf::from("/t/vora"))]);
    }
}
