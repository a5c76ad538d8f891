//! Where a model lies that is given as a folder or by its name on the hub.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use vora_hub::Cache;

/// What a model's folder has, or an adapter's.
const CONFIGS: [&str; 2] = ["config.json", "adapter_config.json"];

/// The folder of `name`: the folder itself if there is one of that name, else its snapshot in the cache of the hub's own
/// clients. Nothing is downloaded.
pub(crate) fn resolve(name: &str) -> Result<PathBuf> {
    let folder = Path::new(name);
    if folder.is_dir() {
        return Ok(folder.to_owned());
    }
    let cache = Cache::from_env()?;
    let repo = cache.repo(name).with_context(|| format!("`{name}` is no folder"))?;
    match repo.main().map(|revision| repo.snapshot(&revision)) {
        Some(snapshot) if CONFIGS.iter().any(|config| snapshot.join(config).exists()) => Ok(snapshot),
        _ => bail!(
            "`{name}` is no folder, and it is not in the cache {}; `cargo xtask download {name}` fetches it",
            cache.root().display()
        ),
    }
}
