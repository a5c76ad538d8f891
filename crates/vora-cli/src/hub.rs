//! Where a model lies that is given as a folder or by its name on the hub: the cache that the hub's own clients use.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// The folder of `name`: the folder itself if there is one of that name, else its snapshot in the hub's cache
/// (`HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub`). Nothing is downloaded.
pub(crate) fn resolve(name: &str) -> Result<PathBuf> {
    let folder = Path::new(name);
    if folder.is_dir() {
        return Ok(folder.to_owned());
    }
    let is_hub_name = name.split('/').count() == 2 && !name.starts_with(['.', '/']);
    if !is_hub_name {
        bail!("`{name}` is neither a folder nor a name on the hub (ORGANISATION/MODEL)");
    }
    let cached = cache().join(format!("models--{}", name.replace('/', "--")));
    let revision = std::fs::read_to_string(cached.join("refs/main")).unwrap_or_default();
    let snapshot = cached.join("snapshots").join(revision.trim());
    if revision.trim().is_empty() || !snapshot.join("config.json").exists() {
        bail!("`{name}` is not in the cache {}; `cargo xtask download {name}` fetches it", cache().display());
    }
    Ok(snapshot)
}

fn cache() -> PathBuf {
    let env = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    env("HF_HUB_CACHE")
        .or_else(|| env("HF_HOME").map(|home| home.join("hub")))
        .or_else(|| env("XDG_CACHE_HOME").map(|cache| cache.join("huggingface/hub")))
        .unwrap_or_else(|| env("HOME").unwrap_or_default().join(".cache/huggingface/hub"))
}
