//! Where a model lies that is given as a folder or by its name on the hub.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::cache::CONFIGS;
use crate::{Cache, HubError, MAIN};

/// The folder of `name`: the folder itself, or a GGUF file, if there is one of that name, else its snapshot in the cache of the hub's own
/// clients. Nothing is downloaded.
///
/// # Errors
/// Where it is another file; [`HubError::Name`] where it is neither a folder nor a model's name, [`HubError::NotCached`] where the cache has no such
/// model, and where no cache is known.
pub fn resolve(name: &str) -> Result<PathBuf> {
    let folder = Path::new(name);
    if folder.is_dir() || folder.is_file() && folder.extension().is_some_and(|extension| extension == "gguf") {
        return Ok(folder.to_owned());
    }
    ensure!(
        !folder.is_file(),
        "`{name}` is a file: a model is a folder with config.json in it, or a .gguf file; an archive has to be unpacked first"
    );
    in_cache(&Cache::from_env()?, name)
}

fn in_cache(cache: &Cache, name: &str) -> Result<PathBuf> {
    let repo = cache.repo(name).with_context(|| format!("`{name}` is no folder"))?;
    let snapshot = repo.commit(MAIN).map(|commit| repo.snapshot(&commit));
    let snapshot = snapshot.filter(|folder| CONFIGS.iter().any(|config| folder.join(config).exists()));
    snapshot.ok_or_else(|| HubError::NotCached { name: name.into(), cache: cache.root().into() }.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_folder_goes_before_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(resolve(folder.path().to_str().unwrap()).unwrap(), folder.path());
        let file = folder.path().join("model.tar.gz");
        fs::write(&file, b"\x1f\x8b").unwrap();
        let error = resolve(file.to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("model.tar.gz` is a file: a model is a folder"), "{error}");
    }

    #[test]
    fn a_name_is_its_snapshot_of_main() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::at(root.path());
        for (name, config) in [("tiny", "config.json"), ("org/adapter", "adapter_config.json")] {
            let repo = cache.repo(name).unwrap();
            let snapshot = repo.snapshot("abc");
            fs::create_dir_all(&snapshot).unwrap();
            repo.set_commit(MAIN, "abc").unwrap();
            let error = in_cache(&cache, name).unwrap_err(); // a download that was cut off
            assert!(matches!(error.downcast_ref(), Some(HubError::NotCached { .. })), "{error:#}");
            fs::write(snapshot.join(config), "{}").unwrap();
            assert_eq!(in_cache(&cache, name).unwrap(), snapshot);
        }
    }

    #[test]
    fn what_is_nowhere_is_told_with_what_fetches_it() {
        let error = in_cache(&Cache::at("/no-such-cache"), "org/model").unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(HubError::NotCached { .. })));
        assert_eq!(
            error.to_string(),
            "`org/model` is no folder, and it is not in the cache /no-such-cache; `vora download org/model` fetches it"
        );
        let error = in_cache(&Cache::at("/no-such-cache"), "../model").unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(HubError::Name(_))));
        assert!(format!("{error:#}").starts_with("`../model` is no folder: `../model` is not a model's name"));
    }
}
