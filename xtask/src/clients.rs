//! `cargo xtask check --clients`: `vora serve` with a tiny model, asked by the clients that people use.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cmd::ChildFailed;
use crate::{cmd, fixtures, setup, test};

/// What a script ends with where something that no package brings is missing; it says what.
const MISSING: u8 = 77;
/// The key that the server asks for.
const KEY: &str = "a key for the check";
/// The name that the model is served by.
const NAME: &str = "smoke";

/// Each script of `fixtures/clients`, and the list there of the packages that it needs.
const CLIENTS: [(&str, &str); 4] = [
    ("openai_package", "requirements-openai.txt"),
    ("page", "requirements-page.txt"),
    ("schema", "requirements-schema.txt"),
    ("lmms", "requirements-lmms-no-deps.txt"),
];

/// Runs all of them, then the soak of ten thousand requests.
///
/// # Errors
/// One of them found a fault. What cannot be installed is told of and left.
pub fn run() -> Result<()> {
    setup::ensure()?;
    let mut build = cmd::cargo();
    build.args(["build", "--workspace", "--locked", "--bin", "vora"]); // with the features that everything else is built with
    let program = cmd::programs(&mut build)?.remove("vora").context("cargo built no program `vora`")?;
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let model = folder.path().join("final");
    let output = format!("output_dir={}", folder.path().display());
    let train = ["train", "--config", "crates/vora-train/recipes/smoke.yaml", "--set", &output];
    cmd::run(Command::new(&program).current_dir(cmd::root()).args(train).stdout(Stdio::null()))?;
    let server = Server::start(&program, &model)?;
    let (mut failed, mut left) = (Vec::new(), Vec::new());
    for (name, requirements) in CLIENTS {
        let python = match environment(name, requirements) {
            Ok(python) => python,
            Err(error) => {
                eprintln!("NOT CHECKED: {name}, whose packages cannot be installed: {error:#}");
                left.push(name);
                continue;
            }
        };
        let mut script = Command::new(python);
        script.arg(scripts().join(format!("{name}.py"))).current_dir(cmd::root());
        script.args(["--address", &server.address, "--model", NAME, "--key", KEY]);
        if name == "lmms" {
            script.arg("--folder").arg(&model).arg("--program").arg(&program);
        }
        if let Err(error) = cmd::run(&mut script) {
            let code = error.downcast_ref::<ChildFailed>().map(ChildFailed::code);
            if code == Some(MISSING) { left.push(name) } else { failed.push(name) }
        }
    }
    drop(server);
    let soak = ["--package", "vora-serve", "--test", "it", "--", "--ignored", "--nocapture", "ten_thousand"]
        .map(str::to_owned)
        .to_vec();
    cmd::run(&mut test::command(&test::Args { args: soak, ..test::Args::default() })?)?;
    if !left.is_empty() {
        eprintln!("NOT CHECKED: {}", left.join(", "));
    }
    if !failed.is_empty() {
        bail!("clients that are not answered as they expect: {}", failed.join(", "));
    }
    eprintln!("all clients are answered as they expect");
    Ok(())
}

fn scripts() -> PathBuf {
    cmd::root().join("fixtures/clients")
}

/// The Python of a client. lmms-eval stands on packages of gigabytes, which the fixtures' environment has.
fn environment(name: &str, requirements: &str) -> Result<PathBuf> {
    let python = fixtures::environment(&format!("clients-python/{name}"), &[scripts().join(requirements)])?;
    if name == "lmms" {
        let below = site_packages(&fixtures::python()?)?;
        let here = site_packages(&python)?.join("fixtures.pth");
        fs::write(&here, below.display().to_string()).with_context(|| format!("cannot write {}", here.display()))?;
    }
    Ok(python)
}

/// Where an environment has its packages.
fn site_packages(python: &Path) -> Result<PathBuf> {
    let ask = "import sysconfig; print(sysconfig.get_path('purelib'))";
    let output = Command::new(python).args(["-c", ask]).output().context("cannot run Python")?;
    Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

/// A running `vora serve`; dropped, it ends.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(program: &Path, model: &Path) -> Result<Self> {
        let mut command = Command::new(program);
        command.arg("serve").arg(model).args(["--served-model-name", NAME, "--port", "0", "--dtype", "f32"]);
        command.env("VORA_API_KEY", KEY).current_dir(cmd::root()).stdout(Stdio::piped());
        let child = command.spawn().context("cannot run vora serve")?;
        let mut server = Self { child, address: String::new() };
        let stdout = server.child.stdout.take().context("vora serve has no output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let address = line.trim().rsplit(' ').next().filter(|address| address.starts_with("http://"));
        server.address = address.with_context(|| format!("vora serve said `{}`", line.trim()))?.to_owned();
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        let _ = self.child.wait();
    }
}
