//! The packages of the workspace as `cargo metadata` tells them, and what each of them builds, as `cargo tree` does.

use std::collections::BTreeSet;
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

/// The part of `cargo metadata` that is read here.
#[derive(Debug, Deserialize)]
pub struct Workspace {
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
pub struct Package {
    pub name: String,
    pub manifest_path: PathBuf,
    targets: Vec<CargoTarget>,
    dependencies: Vec<Dependency>,
}

#[derive(Debug, Deserialize)]
struct CargoTarget {
    kind: Vec<String>,
    name: String,
    src_path: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>, // none is an ordinary one
}

/// A library or program whose modules are read.
#[derive(Debug, Clone)]
pub struct Target {
    /// The name in paths, with underscores.
    pub name: String,
    pub library: bool,
    /// The file of its root module.
    pub file: PathBuf,
}

impl Workspace {
    /// Asks cargo about the workspace in `root`.
    ///
    /// # Errors
    /// cargo fails.
    pub fn read(root: &Path) -> Result<Self> {
        let output = stdout(cargo(root).args(["metadata", "--format-version", "1", "--no-deps"]))?;
        serde_json::from_slice(&output).context("reading what cargo metadata wrote")
    }

    /// The packages of the workspace itself, by name.
    pub fn members(&self) -> Vec<&Package> {
        let mut members: Vec<_> = self.packages.iter().collect();
        members.sort_by_key(|package| &package.name);
        members
    }

    /// Their libraries and programs; tests, examples, benches and build scripts are not among them.
    pub fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        for target in self.members().into_iter().flat_map(|package| &package.targets) {
            let library = target.kind.iter().any(|kind| kind.ends_with("lib") || kind == "proc-macro");
            if library || target.kind.iter().any(|kind| kind == "bin") {
                let name = target.name.replace('-', "_");
                targets.push(Target { name, library, file: target.src_path.clone() });
            }
        }
        targets
    }

    /// What the package names under `[dependencies]` and `[build-dependencies]` of the workspace's own packages.
    pub fn direct(&self, package: &Package) -> BTreeSet<String> {
        let members: BTreeSet<_> = self.members().into_iter().map(|member| member.name.as_str()).collect();
        let named = package.dependencies.iter().filter(|dependency| dependency.kind.as_deref() != Some("dev"));
        named.filter(|dependency| members.contains(dependency.name.as_str())).map(|d| d.name.clone()).collect()
    }
}

/// How the build of a package alone, with its tests, comes to one of the packages called `names`: the packages on the
/// way. Each package is asked about by itself: over the whole workspace, features that one of its packages asks for are
/// everybody's, here as in `cargo build --workspace`.
///
/// # Errors
/// cargo fails.
pub fn way_to(root: &Path, package: &str, names: &[&str]) -> Result<Option<Vec<String>>> {
    let mut tree = cargo(root);
    tree.args(["tree", "--package", package, "--edges", "normal,build,dev", "--prefix", "depth"]);
    let tree = stdout(tree.args(["--offline", "--locked"]))?;
    Ok(way_in(&String::from_utf8_lossy(&tree), names))
}

/// The first way in a tree whose lines are `DEPTH NAME VERSION ..`, without the blank after the depth.
fn way_in(tree: &str, names: &[&str]) -> Option<Vec<String>> {
    let mut way: Vec<String> = Vec::new();
    for line in tree.lines() {
        let name = line.trim_start_matches(|c: char| c.is_ascii_digit());
        let depth = line[..line.len() - name.len()].parse().ok()?;
        let name = name.split(' ').next()?;
        way.truncate(depth);
        way.push(name.to_owned());
        if names.contains(&name) {
            return Some(way);
        }
    }
    None
}

fn cargo(root: &Path) -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root);
    cargo
}

fn stdout(cargo: &mut Command) -> Result<Vec<u8>> {
    let output = cargo.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    if !output.status.success() {
        let task = cargo.get_args().next().unwrap_or_default();
        bail!("cargo {} failed ({})", task.display(), output.status);
    }
    Ok(output.stdout)
}

#[cfg(test)]
impl Workspace {
    /// A workspace of packages under `crates/`, from lines `name -> ordinary, dev:test_only`.
    pub fn of(lines: &[&str]) -> Self {
        let package = |line: &&str| {
            let (name, right) = line.split_once(" -> ").unwrap_or((line, ""));
            let words = right.split(", ").filter(|word| !word.is_empty());
            let dependency = |word: &str| match word.strip_prefix("dev:") {
                Some(to) => Dependency { name: to.into(), kind: Some("dev".into()) },
                None => Dependency { name: word.into(), kind: None },
            };
            let manifest_path = format!("/house/crates/{name}/Cargo.toml").into();
            let dependencies = words.map(dependency).collect();
            Package { name: name.into(), manifest_path, targets: Vec::new(), dependencies }
        };
        Self { packages: lines.iter().map(package).collect() }
    }

    /// Lies at `root` in place of `/house`.
    pub fn move_to(&mut self, root: &Path) {
        for package in &mut self.packages {
            package.manifest_path = root.join(package.manifest_path.strip_prefix("/house").unwrap());
        }
    }
}

#[cfg(test)]
pub(crate) fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("house/ lies in the workspace").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_is_read_from_cargos_tree() {
        let tree =
            "0data v0.1.0 (/x)\n1text v0.1.0\n2gguf v0.1.0\n1flate2 v1.1.11\n1fixtures v0.1.0 (/y)\n2tch v0.24.0\n";
        assert_eq!(way_in(tree, &["tch", "torch-sys"]).unwrap(), ["data", "fixtures", "tch"]);
        assert_eq!(way_in(tree, &["gguf"]).unwrap(), ["data", "text", "gguf"]);
        assert_eq!(way_in(tree, &["torch-sys"]), None);
        assert_eq!(way_in("0tch v0.24.0", &["tch"]).unwrap(), ["tch"]);
        assert_eq!(way_in("0data v0.1.0\n1tch-extras v1.0.0 (*)", &["tch"]), None);
    }

    #[test]
    fn features_are_those_of_the_package_alone() {
        let way_to = |package, names: &[&str]| way_to(&here(), package, names);
        // vora-data's tests take `fixtures` without tch, vora-torch's with it.
        assert_eq!(way_to("vora-data", &["tch", "torch-sys"]).unwrap(), None);
        assert!(way_to("vora-data", &["fixtures"]).unwrap().is_some());
        assert!(way_to("vora-torch", &["tch"]).unwrap().is_some());
        assert!(way_to("no-such-package", &["tch"]).is_err());
    }

    #[test]
    fn this_workspace_is_read() {
        let workspace = Workspace::read(&here()).unwrap();
        let targets = workspace.targets();
        assert!(targets.iter().any(|target| target.name == "xtask" && !target.library), "{targets:?}");
        assert!(targets.iter().any(|target| target.name == "vora_gguf" && target.library), "{targets:?}");
        let xtask = workspace.members().into_iter().find(|package| package.name == "xtask").unwrap();
        assert!(workspace.direct(xtask).contains("vora-gguf"));
    }
}
