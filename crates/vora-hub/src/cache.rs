//! The cache folder of the hub's own clients: `models--ORG--NAME/{blobs,refs,snapshots}`, shared with Python.

use std::env;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::environment;

/// A cache.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The cache in this folder.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The cache that Python's client would use here: `HF_HUB_CACHE`, else `HUGGINGFACE_HUB_CACHE`, else `HF_HOME/hub`, else
    /// `~/.cache/huggingface/hub`.
    ///
    /// # Errors
    /// Where none of these is set and no home folder is known.
    pub fn from_env() -> Result<Self> {
        environment::root(|name| env::var_os(name), env::home_dir()).map(Self::at)
    }

    /// The cache's folder.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The place of one model, by its name on the hub: `NAME` or `ORGANISATION/NAME`.
    ///
    /// # Errors
    /// Where no model can have such a name.
    pub fn repo(&self, name: &str) -> Result<Repo> {
        let fits = |part: &str| {
            let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            (1..=96).contains(&part.len())
                && part.chars().all(legal)
                && !part.starts_with(['-', '.'])
                && !part.ends_with(['-', '.'])
        };
        let is_name = name.split('/').count() <= 2
            && name.split('/').all(fits)
            && !name.contains("--")
            && !name.contains("..")
            && !name.ends_with(".git");
        ensure!(is_name, "`{name}` is not a model's name on the hub: NAME or ORGANISATION/NAME, such as `gpt2`");
        let folder = format!("models--{}", name.replace('/', "--"));
        Ok(Repo { folder: self.root.join(&folder), locks: self.root.join(".locks").join(folder) })
    }
}

/// One model in the cache.
#[derive(Debug)]
pub struct Repo {
    folder: PathBuf,
    locks: PathBuf,
}

impl Repo {
    /// Where all of it lies.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Where the files of one revision are shown.
    pub fn snapshot(&self, revision: &str) -> PathBuf {
        self.folder.join("snapshots").join(revision)
    }

    /// The revision that `main` was when it was fetched.
    pub fn main(&self) -> Option<String> {
        let revision = fs::read_to_string(self.folder.join("refs/main")).ok()?;
        let revision = revision.trim();
        let is_a_name = !revision.is_empty() && !revision.contains(['/', '\\']) && !revision.starts_with('.');
        is_a_name.then(|| revision.to_owned())
    }

    /// Says which revision `main` is.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn set_main(&self, revision: &str) -> Result<()> {
        let refs = self.folder.join("refs");
        fs::create_dir_all(&refs).with_context(|| format!("cannot create {}", refs.display()))?;
        let write = || {
            let mut new = tempfile::NamedTempFile::new_in(&refs)?;
            new.write_all(revision.as_bytes())?;
            new.persist(refs.join("main"))?;
            Ok::<_, std::io::Error>(())
        };
        write().with_context(|| format!("cannot write refs/main in {}", refs.display()))
    }

    /// Where the bytes of a file with this `etag` lie.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Shows the blob `etag` as `file` of the snapshot `revision`: a relative link, a copy where there are no links.
    ///
    /// # Errors
    /// Where the snapshot cannot be written.
    pub fn link(&self, revision: &str, file: &str, etag: &str) -> Result<()> {
        let snapshot = self.snapshot(revision);
        fs::create_dir_all(&snapshot).with_context(|| format!("cannot create {}", snapshot.display()))?;
        let make = |new: &Path| {
            #[cfg(unix)]
            return std::os::unix::fs::symlink(Path::new("../../blobs").join(etag), new);
            #[cfg(not(unix))]
            return fs::copy(self.blob(etag), new).map(|_| ());
        };
        // Beside its place under a name of its own, then renamed: two may put the same file here at once.
        let put =
            || tempfile::Builder::new().make_in(&snapshot, make)?.persist(snapshot.join(file)).map_err(|e| e.error);
        put().map(|_| ()).with_context(|| format!("cannot put {file} into {}", snapshot.display()))
    }

    /// Waits for the lock named `name`, which Python's client takes as well, and holds it until the file is dropped.
    ///
    /// # Errors
    /// Where there can be no such file.
    pub fn lock(&self, name: &str) -> Result<File> {
        let path = self.locks.join(format!("{name}.lock"));
        let open = || {
            fs::create_dir_all(&self.locks)?;
            let file = File::options().create(true).truncate(false).write(true).open(&path)?;
            file.lock()?;
            Ok::<_, std::io::Error>(file)
        };
        open().with_context(|| format!("cannot lock {}", path.display()))
    }
}

/// Whether a folder has what a model is built from: `config.json`, `files`, and all weights.
///
/// # Errors
/// Names the first file that is missing.
pub fn check_complete(folder: &Path, files: &[&str]) -> Result<()> {
    for file in ["config.json"].iter().chain(files) {
        ensure!(folder.join(file).is_file(), "{} has no {file}", folder.display());
    }
    if folder.join("model.safetensors").is_file() {
        return Ok(());
    }
    let index = folder.join("model.safetensors.index.json");
    ensure!(index.is_file(), "{} has neither model.safetensors nor its index", folder.display());
    let text = fs::read_to_string(&index).with_context(|| format!("reading {}", index.display()))?;
    let index: Value = serde_json::from_str(&text).with_context(|| format!("reading {}", index.display()))?;
    let shards = index["weight_map"].as_object().context("the index has no weight_map")?;
    for shard in shards.values() {
        let shard = shard.as_str().context("a name in the index's weight_map is not a string")?;
        ensure!(folder.join(shard).is_file(), "{} has no {shard}", folder.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_the_cache() {
        let cache = Cache::at("/c");
        assert_eq!(cache.repo("a/b-1.5_x").unwrap().folder, Path::new("/c/models--a--b-1.5_x"));
        assert_eq!(cache.repo("gpt2").unwrap().folder, Path::new("/c/models--gpt2"));
        let long = "a".repeat(97);
        for name in [
            long.as_str(),
            "a--b",
            "a.git",
            "a-",
            "~",
            "..",
            ".",
            "./x",
            "/x",
            "x/",
            "a/b/c",
            "../b",
            "a/..",
            "a/b..c",
            "/b",
            "a/",
            "a/b c",
            "a/-b",
            "a\\b/c",
            "",
        ] {
            let error = cache.repo(name).unwrap_err().to_string();
            assert!(error.contains("NAME or ORGANISATION/NAME"), "{name}: {error}");
        }
        let folder = tempfile::tempdir().unwrap();
        let repo = Cache::at(folder.path()).repo("a/b").unwrap();
        assert_eq!(repo.main(), None);
        repo.set_main("abc").unwrap();
        assert_eq!(repo.main().as_deref(), Some("abc"));
        repo.set_main("../../etc").unwrap();
        assert_eq!(repo.main(), None);
    }

    #[test]
    fn a_folder_is_complete_with_config_and_all_shards() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        let error = || check_complete(folder.path(), &["tokenizer.json"]).unwrap_err().to_string();
        assert!(error().ends_with("has no config.json"), "{}", error());
        write("config.json", "{}");
        assert!(error().ends_with("has no tokenizer.json"));
        write("tokenizer.json", "{}");
        assert!(error().ends_with("neither model.safetensors nor its index"));
        write("model.safetensors.index.json", r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#);
        write("1.safetensors", "");
        assert!(error().ends_with("has no 2.safetensors"));
        write("2.safetensors", "");
        check_complete(folder.path(), &["tokenizer.json"]).unwrap();
    }
}
