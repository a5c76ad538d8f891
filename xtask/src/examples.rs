//! The programs of `examples/`: run where they are, and one of them in a project outside the clone, as somebody else's would
//! be, by what the README says and nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::{cmd, setup};

/// The package in `examples/`.
const PACKAGE: &str = "vora-examples";

/// Each program with its arguments; `OUT` is a folder of its own, which is gone afterwards.
const PROGRAMS: [(&str, &[&str]); 11] = [
    ("attach_lora", &["OUT/adapter"]),
    ("generate_text", &["fixtures/tiny/llm", "Once upon a time"]),
    ("encoder_features", &["fixtures/tiny/dinov2", "fixtures/tiny/data/images/0.png"]),
    ("own_data", &["fixtures/tiny/llm", "OUT/data"]),
    ("own_teacher", &["fixtures/tiny/llm", "OUT/teacher"]),
    ("own_backbone", &["fixtures/tiny/llm", "OUT/backbone"]),
    ("teach_gemma4", &["fixtures/tiny/gemma4", "OUT/gemma4"]),
    ("stream_answer", &["OUT/gemma4/final", "Is it dark or light?", "fixtures/tiny/data/images/0.png"]),
    ("stream_answer", &["fixtures/tiny/llm", "What is a cat?"]),
    ("stream_answer", &["OUT/data/final", "Is it dark or light?", "fixtures/tiny/data/images/0.png"]),
    ("attention_benchmark", &["2"]),
];

/// Builds all of them and runs each on the tiny models of `fixtures/`.
///
/// # Errors
/// One does not build, or ends with anything but 0.
pub fn run_all() -> Result<()> {
    setup::ensure()?;
    let mut build = cmd::cargo();
    // With the workspace's features, as everything else that is built here.
    build.args(["build", "--workspace", "--locked"]);
    for (name, _) in PROGRAMS {
        build.args(["--bin", name]);
    }
    let built = cmd::programs(&mut build)?;
    let out = tempfile::tempdir().context("cannot make a temporary folder")?;
    for (name, args) in PROGRAMS {
        let program = built.get(name).with_context(|| format!("cargo built no program `{name}` of {PACKAGE}"))?;
        let args = args.iter().map(|arg| arg.replace("OUT", &out.path().display().to_string()));
        cmd::run(Command::new(program).current_dir(cmd::root()).args(args))?;
    }
    Ok(())
}

/// What the README has for a project of one's own.
struct Told {
    dependencies: String,
    build_script: String,
}

impl Told {
    fn read(readme: &str) -> Result<Self> {
        let section = readme.split("\n## ").find(|section| section.starts_with("Depend on one crate"));
        let section = section.context("README.md has no section `Depend on one crate`")?;
        let block = |begin: &str| {
            let (_, rest) = section.split_once(begin)?;
            Some(rest.split_once("```")?.0.to_owned())
        };
        Ok(Self {
            dependencies: block("```toml\n").context("the section has no `toml` block")?,
            build_script: block("```rust\n// build.rs\n").context("the section has no build.rs")?,
        })
    }

    /// `Cargo.toml`, with the clone in place of an address.
    fn manifest(&self, crates: &Path) -> Result<String> {
        let address = "git = \"…\", rev = \"…\"";
        ensure!(self.dependencies.contains(address), "the README's dependencies name no `{address}`");
        let path = format!("path = \"{}\"", crates.join("vora-lora").display());
        let dependencies = self.dependencies.replace(address, &path);
        Ok(format!("[package]\nname = \"stranger\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n{dependencies}"))
    }
}

/// Builds `attach_lora.rs` in a temporary folder, and starts it from another one by itself.
///
/// Cargo is told the profile and the flags of the clone and works in its target folder, so that what is compiled there is
/// not compiled again (C++ above all); the program then runs where the clone's own rpath leads nowhere, and the place of
/// libtorch is what the README's build.rs linked.
///
/// # Errors
/// As [`run_all`], and where the README lacks what such a project needs.
pub fn as_a_stranger() -> Result<()> {
    setup::ensure()?;
    let root = cmd::root();
    let told = Told::read(&fs::read_to_string(root.join("README.md")).context("cannot read README.md")?)?;
    let project = tempfile::tempdir().context("cannot make a temporary folder")?;
    let file = |name: &str| project.path().join(name);
    fs::create_dir(file("src"))?;
    fs::write(file("Cargo.toml"), told.manifest(&root.join("crates"))?)?;
    fs::write(file("build.rs"), &told.build_script)?;
    fs::copy(root.join("examples/attach_lora.rs"), file("src/main.rs"))?;
    fs::copy(root.join("Cargo.lock"), file("Cargo.lock"))?; // the versions that are here already

    let mut build = cmd::cargo();
    build.current_dir(project.path()).args(["build", "--offline"]);
    for setting in clone_settings(&root)? {
        build.args(["--config", &setting]);
    }
    build.env("CARGO_TARGET_DIR", target(&root)).env("LIBTORCH", root.join(".libtorch"));
    let built = cmd::programs(&mut build)?;
    let elsewhere = project.path().join("elsewhere");
    fs::create_dir(&elsewhere)?;
    let program = elsewhere.join("stranger");
    fs::copy(built.get("stranger").context("cargo built no program `stranger`")?, &program)?;
    let mut run = Command::new(&program);
    run.current_dir(&elsewhere).env_remove("LD_LIBRARY_PATH").env_remove("LIBTORCH").arg("adapter");
    cmd::run(run.stdin(Stdio::null()))?;
    ensure!(elsewhere.join("adapter/adapter_config.json").exists(), "attach_lora wrote no adapter");
    Ok(())
}

/// The clone's target folder.
fn target(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |folder| root.join(folder))
}

/// What changes how a crate is compiled here: the flags of `.cargo/config.toml` and the profile of `Cargo.toml`.
fn clone_settings(root: &Path) -> Result<Vec<String>> {
    let read = |name: &str| fs::read_to_string(root.join(name)).with_context(|| format!("cannot read {name}"));
    let (config, manifest) = (read(".cargo/config.toml")?, read("Cargo.toml")?);
    let value = |text: &str, section: &str, key: &str| {
        let (_, rest) = text.split_once(&format!("\n[{section}]\n"))?;
        let rest = rest.split("\n[").next()?;
        Some(rest.lines().find_map(|line| line.strip_prefix(&format!("{key} = ")))?.to_owned())
    };
    let setting = |text: &str, section: &str, key: &str| {
        let value = value(text, section, key).with_context(|| format!("no `{key}` in [{section}]"))?;
        anyhow::Ok(format!("{section}.{key} = {value}"))
    };
    Ok(vec![
        setting(&config, "target.'cfg(target_os = \"linux\")'", "rustflags")?,
        setting(&manifest, "profile.dev", "debug")?,
        setting(&manifest, "profile.dev.package.\"*\"", "debug")?,
    ])
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn the_readme_has_what_a_strangers_project_needs() {
        let told = Told::read(&fs::read_to_string(cmd::root().join("README.md")).unwrap()).unwrap();
        let manifest = told.manifest(Path::new("/clone/crates")).unwrap();
        assert!(manifest.contains("vora-lora = { path = \"/clone/crates/vora-lora\" }"), "{manifest}");
        assert!(manifest.contains("anyhow = ") && told.build_script.contains("-rpath"), "{}", told.build_script);
    }

    #[test]
    fn the_clones_settings_are_found() {
        let found = clone_settings(&cmd::root()).unwrap();
        assert!(
            found[0].contains(".rustflags = [") && found[1] == "profile.dev.debug = \"line-tables-only\"",
            "{found:?}"
        );
        assert_eq!(found[2], "profile.dev.package.\"*\".debug = false");
    }

    #[test]
    fn every_program_of_the_folder_is_run() {
        let manifest = fs::read_to_string(cmd::root().join("examples/Cargo.toml")).unwrap();
        let named: Vec<&str> =
            manifest.lines().filter_map(|line| line.strip_prefix("path = \"")?.strip_suffix(".rs\"")).collect();
        let run: HashMap<&str, &[&str]> = PROGRAMS.into_iter().collect();
        assert!(!named.is_empty() && named.iter().all(|name| run.contains_key(name)), "{named:?}");
    }
}
