//! The packages of the workspace and what they depend on, as `cargo metadata` tells it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::cmd;

/// The part of `cargo metadata` that is read here.
#[derive(Debug, Deserialize)]
pub struct Workspace {
    packages: Vec<Package>,
    workspace_members: Vec<String>,
    resolve: Resolve,
}

#[derive(Debug, Deserialize)]
pub struct Package {
    pub name: String,
    pub manifest_path: PathBuf,
    id: String,
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

#[derive(Debug, Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Debug, Deserialize)]
struct Node {
    id: String,
    deps: Vec<NodeDependency>,
}

#[derive(Debug, Deserialize)]
struct NodeDependency {
    pkg: String,
    dep_kinds: Vec<DependencyKind>,
}

#[derive(Debug, Deserialize)]
struct DependencyKind {
    kind: Option<String>,
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
    /// Asks cargo.
    pub fn read() -> Result<Self> {
        let output = cmd::cargo()
            .args(["metadata", "--format-version", "1", "--locked"])
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run cargo metadata")?;
        if !output.status.success() {
            bail!("cargo metadata failed ({})", output.status);
        }
        serde_json::from_slice(&output.stdout).context("reading what cargo metadata wrote")
    }

    /// The packages of the workspace itself, by name.
    pub fn members(&self) -> Vec<&Package> {
        let mut members: Vec<_> =
            self.packages.iter().filter(|package| self.workspace_members.contains(&package.id)).collect();
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

    /// How the package comes to one of the packages called `names`, its own tests included: the packages on the way.
    pub fn way_to(&self, package: &Package, names: &[&str]) -> Option<Vec<String>> {
        let nodes: BTreeMap<&str, &Node> = self.resolve.nodes.iter().map(|node| (node.id.as_str(), node)).collect();
        let name_of: BTreeMap<&str, &str> = self.packages.iter().map(|p| (p.id.as_str(), p.name.as_str())).collect();
        let mut ways = vec![vec![package.id.as_str()]];
        let mut seen = BTreeSet::from([package.id.as_str()]);
        let mut next = 0;
        while let Some(way) = ways.get(next).cloned() {
            next += 1;
            let id = *way.last()?;
            if names.contains(name_of.get(id)?) {
                return Some(way.iter().filter_map(|id| name_of.get(id)).map(|name| (*name).to_owned()).collect());
            }
            for dependency in nodes.get(id).into_iter().flat_map(|node| &node.deps) {
                // The tests of what it depends on are not built.
                let built = dependency.dep_kinds.iter().any(|kind| kind.kind.as_deref() != Some("dev"));
                if (built || way.len() == 1) && seen.insert(&dependency.pkg) {
                    ways.push([&way[..], &[dependency.pkg.as_str()]].concat());
                }
            }
        }
        None
    }
}

#[cfg(test)]
impl Workspace {
    /// A workspace of packages under `crates/`, from lines `name -> ordinary, dev:test_only`; what is named on the
    /// right alone comes from outside.
    pub fn of(lines: &[&str]) -> Self {
        let mut packages = BTreeMap::new();
        let mut members = Vec::new();
        let mut nodes = Vec::new();
        for line in lines {
            let (name, right) = line.split_once(" -> ").unwrap_or((line, ""));
            let mut dependencies = Vec::new();
            let mut deps = Vec::new();
            for word in right.split(", ").filter(|word| !word.is_empty()) {
                let (kind, to) = match word.strip_prefix("dev:") {
                    Some(to) => (Some("dev".to_owned()), to),
                    None => (None, word),
                };
                dependencies.push(Dependency { name: to.into(), kind: kind.clone() });
                deps.push(NodeDependency { pkg: to.into(), dep_kinds: vec![DependencyKind { kind }] });
                packages.entry(to.to_owned()).or_insert_with(|| Package::of(to, Vec::new()));
            }
            packages.insert(name.to_owned(), Package::of(name, dependencies));
            members.push(name.to_owned());
            nodes.push(Node { id: name.into(), deps });
        }
        Self { packages: packages.into_values().collect(), workspace_members: members, resolve: Resolve { nodes } }
    }

    /// Lies at `root` in place of `/house`.
    pub fn move_to(&mut self, root: &std::path::Path) {
        for package in &mut self.packages {
            package.manifest_path = root.join(package.manifest_path.strip_prefix("/house").unwrap());
        }
    }
}

#[cfg(test)]
impl Package {
    fn of(name: &str, dependencies: Vec<Dependency>) -> Self {
        let manifest_path = format!("/house/crates/{name}/Cargo.toml").into();
        Self { name: name.into(), manifest_path, id: name.into(), targets: Vec::new(), dependencies }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_pass_the_tests_of_the_package_alone() {
        let workspace = Workspace::of(&["data -> text, dev:fixtures", "text -> dev:fixtures", "fixtures -> tch"]);
        let members = workspace.members();
        let way = |name: &str| {
            let package = members.iter().find(|package| package.name == name).expect("it is a member");
            workspace.way_to(package, &["tch", "torch-sys"])
        };
        assert_eq!(way("data").unwrap(), ["data", "fixtures", "tch"]);
        assert_eq!(way("text").unwrap(), ["text", "fixtures", "tch"]);

        let workspace = Workspace::of(&["data -> text", "text -> dev:tch"]);
        assert_eq!(workspace.way_to(workspace.members()[0], &["tch"]), None); // only the tests of `text` use it
    }

    #[test]
    fn this_workspace_is_read() {
        let workspace = Workspace::read().unwrap();
        let targets = workspace.targets();
        assert!(targets.iter().any(|target| target.name == "xtask" && !target.library), "{targets:?}");
        assert!(targets.iter().any(|target| target.name == "vora_gguf" && target.library), "{targets:?}");
        let xtask = workspace.members().into_iter().find(|package| package.name == "xtask").unwrap();
        assert!(workspace.direct(xtask).contains("vora-gguf"));
    }
}
