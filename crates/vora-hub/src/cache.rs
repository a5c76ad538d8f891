//! The cache folder of the hub's own clients: `models--ORG--NAME/{blobs,refs,snapshots}`, shared with Python.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::listing::{COMMIT_LEN, is_hex};
use crate::{HubError, environment};

/// The branch that a model's name alone stands for.
pub const MAIN: &str = "main";

/// What says in a folder that it is a model's, or an adapter's.
pub(crate) const CONFIGS: [&str; 2] = ["config.json", "adapter_config.json"];

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
    /// [`HubError::Name`] where no model can have such a name.
    pub fn repo(&self, name: &str) -> Result<Repo> {
        check_name(name)?;
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

    /// The commit that a branch or a tag was when it was fetched.
    pub fn commit(&self, reference: &str) -> Option<String> {
        let commit = fs::read_to_string(self.reference(reference)?).ok()?;
        let commit = commit.trim();
        is_part(commit).then(|| commit.to_owned())
    }

    /// Says which commit a branch or a tag is.
    ///
    /// # Errors
    /// Where it cannot have such a name, or cannot be written.
    pub fn set_commit(&self, reference: &str, commit: &str) -> Result<()> {
        let path = self.reference(reference).with_context(|| format!("`{reference}` is not a branch or a tag"))?;
        let write = || {
            let folder = path.parent().unwrap_or(&self.folder);
            fs::create_dir_all(folder)?;
            let mut new = tempfile::NamedTempFile::new_in(folder)?;
            new.write_all(commit.as_bytes())?;
            new.persist(&path)?;
            Ok::<_, std::io::Error>(())
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    fn reference(&self, name: &str) -> Option<PathBuf> {
        is_revision(name).then(|| self.folder.join("refs").join(name))
    }

    /// The snapshot of a branch, a tag or a commit where the cache has all of it, `files` among it.
    pub fn complete(&self, revision: &str, files: &[&str]) -> Option<PathBuf> {
        let commit = self.commit(revision).or_else(|| is_part(revision).then(|| revision.to_owned()))?;
        let snapshot = self.snapshot(&commit);
        check_complete(&snapshot, files).is_ok().then_some(snapshot)
    }

    /// The same of what came from the hub: a snapshot that was converted from elsewhere has no commit for a name.
    pub fn fetched(&self, revision: &str) -> Option<PathBuf> {
        let is_commit = |name: &OsStr| name.to_str().is_some_and(|name| is_hex(name, COMMIT_LEN));
        self.complete(revision, &[]).filter(|snapshot| snapshot.file_name().is_some_and(is_commit))
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

/// Refuses what cannot be a model's name.
pub(crate) fn check_name(name: &str) -> Result<(), HubError> {
    let fits = |part: &str| is_part(part) && part.len() <= 96 && !part.starts_with('-') && !part.ends_with('-');
    let is_name = name.split('/').count() <= 2
        && name.split('/').all(fits)
        && !name.contains("--")
        && !name.contains("..")
        && !name.ends_with(".git");
    if is_name { Ok(()) } else { Err(HubError::Name(name.into())) }
}

/// Whether a branch, a tag or a commit can have this name: parts that cannot lead out of a folder, with `/` between them.
pub(crate) fn is_revision(name: &str) -> bool {
    name.split('/').all(is_part)
}

/// Whether a text can be the name of a file, and stand in a URL as it is.
fn is_part(text: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !text.is_empty() && text.chars().all(legal) && !text.starts_with('.') && !text.ends_with('.')
}

/// Whether a folder has what a model is built from: `config.json`, `files`, and all weights; of an adapter its
/// `adapter_config.json`, `files`, and `adapter_model.safetensors`.
///
/// # Errors
/// Names the first file that is missing.
pub fn check_complete(folder: &Path, files: &[&str]) -> Result<()> {
    let [model, adapter] = CONFIGS;
    let is_adapter = !folder.join(model).is_file() && folder.join(adapter).is_file();
    let first = if is_adapter { "adapter_model.safetensors" } else { model };
    for file in [first].iter().chain(files) {
        ensure!(folder.join(file).is_file(), "{} has no {file}", folder.display());
    }
    if is_adapter || folder.join("model.safetensors").is_file() {
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
    }

    #[test]
    fn branches_and_tags_cannot_leave_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let repo = Cache::at(folder.path()).repo("a/b").unwrap();
        for name in [MAIN, "v1.0", "refs/pr/1"] {
            assert_eq!(repo.commit(name), None);
            repo.set_commit(name, "abc").unwrap();
            assert_eq!(repo.commit(name).as_deref(), Some("abc"));
            assert_eq!(fs::read_to_string(repo.folder().join("refs").join(name)).unwrap(), "abc");
            repo.set_commit(name, "../../etc").unwrap();
            assert_eq!(repo.commit(name), None);
        }
        for name in ["", "/", "a/", "/a", "..", "../main", "a/../../b", "a\\b", "a b"] {
            assert_eq!((repo.commit(name), repo.complete(name, &[])), (None, None), "{name}");
            let error = repo.set_commit(name, "abc").unwrap_err().to_string();
            assert!(error.contains("is not a branch or a tag"), "{name}: {error}");
        }
    }

    #[test]
    fn a_snapshot_is_complete_by_branch_and_by_commit() {
        let folder = tempfile::tempdir().unwrap();
        let repo = Cache::at(folder.path()).repo("a/b").unwrap();
        let snapshot = repo.snapshot("abc");
        fs::create_dir_all(&snapshot).unwrap();
        repo.set_commit("v1", "abc").unwrap();
        fs::write(snapshot.join("config.json"), "{}").unwrap();
        assert_eq!(repo.complete("v1", &[]), None);
        fs::write(snapshot.join("model.safetensors"), "").unwrap();
        for revision in ["v1", "abc"] {
            assert_eq!(repo.complete(revision, &[]).as_ref(), Some(&snapshot));
            assert_eq!(repo.complete(revision, &["tokenizer.json"]), None);
        }
        assert_eq!(repo.complete(MAIN, &[]), None);
    }

    #[test]
    fn what_was_converted_did_not_come_from_the_hub() {
        let folder = tempfile::tempdir().unwrap();
        let repo = Cache::at(folder.path()).repo("a/b").unwrap();
        let commit = "0123456789abcdef0123456789abcdef01234567";
        for (name, came) in [("pypi-package-1.0", false), (commit, true)] {
            let snapshot = repo.snapshot(name);
            fs::create_dir_all(&snapshot).unwrap();
            repo.set_commit(MAIN, name).unwrap();
            assert_eq!(repo.fetched(MAIN), None); // empty
            for file in ["config.json", "model.safetensors"] {
                fs::write(snapshot.join(file), "{}").unwrap();
            }
            assert_eq!(repo.complete(MAIN, &[]).as_ref(), Some(&snapshot));
            assert_eq!(repo.fetched(MAIN), came.then_some(snapshot));
        }
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

    #[test]
    fn an_adapter_is_complete_with_its_own_files() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("adapter_config.json"), "{}").unwrap();
        let error = check_complete(folder.path(), &[]).unwrap_err().to_string();
        assert!(error.ends_with("has no adapter_model.safetensors"), "{error}");
        fs::write(folder.path().join("adapter_model.safetensors"), "").unwrap();
        check_complete(folder.path(), &[]).unwrap();
    }
}
