//! Checkpoints that a crash cannot halve: written beside their place, checksummed, synced, renamed.

use std::fs::{self, File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, bail, ensure};
use vora_files::checksums::{self, MANIFEST};

/// Where the trainer stands: the file that every checkpoint has.
pub const TRAINER_STATE: &str = "trainer_state.json";

/// What a run writes beside its checkpoints, its log and its events.
const RESULTS: [&str; 7] =
    ["final", "samples", "block_maps", "eval.json", "train_results.json", "loss.svg", "report.html"];

/// A run's folder that no other trainer may write to while this lives.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    _lock: Option<File>, // held by one of the processes that train together
}

impl RunFolder {
    /// Makes the folder where it is missing and locks it; leftovers of a save that was cut short are removed.
    ///
    /// # Errors
    /// Where another process has the folder, or it cannot be made.
    pub fn lock(path: &Path) -> Result<Self> {
        let what = || format!("cannot use the run folder {}", path.display());
        fs::create_dir_all(path.join("checkpoints")).with_context(what)?;
        let lock_path = path.join(".lock");
        let mut options = File::options();
        let mut lock =
            options.read(true).write(true).create(true).truncate(false).open(&lock_path).with_context(what)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = lock.read_to_string(&mut holder);
                bail!("the run folder {} is in use by another trainer (process {})", path.display(), holder.trim());
            }
            Err(TryLockError::Error(error)) => return Err(error).with_context(what),
        }
        lock.set_len(0).with_context(what)?;
        write!(lock, "{}", std::process::id()).with_context(what)?;
        let this = Self { path: path.to_owned(), _lock: Some(lock) };
        for entry in fs::read_dir(this.checkpoints()).with_context(what)? {
            let entry = entry.with_context(what)?;
            if entry.file_name().to_string_lossy().starts_with(".tmp-") {
                fs::remove_dir_all(entry.path()).with_context(what)?;
            }
        }
        Ok(this)
    }

    /// The folder of a run that this process takes part in; another one has locked it and writes there.
    pub fn of_others(path: &Path) -> Self {
        Self { path: path.to_owned(), _lock: None }
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes what the last run left here: a new run takes the folder. Files that no run writes stay.
    ///
    /// # Errors
    /// Names what cannot be removed.
    pub fn clear(&self) -> Result<()> {
        let folders = list(&self.path)?.into_iter().map(|(_, folder)| folder);
        let of_the_run = RESULTS.iter().map(|name| self.path.join(name));
        for path in folders.chain(of_the_run) {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            match removed {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// Where the checkpoint of a step lies.
    pub fn checkpoint(&self, step: u64) -> PathBuf {
        self.checkpoints().join(format!("step-{step}"))
    }

    /// Writes `checkpoints/step-N`: `write` fills a folder beside that place, which is checksummed, synced and
    /// renamed. Then all but those that `keep` names are removed. On an error nothing of it is left, and the
    /// checkpoints before it are as they were.
    ///
    /// # Errors
    /// That of `write`, or of the disk.
    pub fn save(&self, step: u64, keep: Keep, write: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let folder = self.checkpoint(step);
        replace_folder(&folder, write)?;
        let old = list(&self.path)?.into_iter().rev().skip(keep.newest.max(1));
        for (_, old) in old.filter(|(step, _)| keep.best != Some(*step)) {
            // First out of sight, so that no half-removed checkpoint is ever found.
            let gone = self.checkpoints().join(format!(".tmp-old-{}", name_of(&old)));
            fs::rename(&old, &gone).with_context(|| format!("cannot remove {}", old.display()))?;
            fs::remove_dir_all(&gone).with_context(|| format!("cannot remove {}", gone.display()))?;
        }
        Ok(folder)
    }

    /// Writes a folder of the run, as [`Self::save`] writes a checkpoint.
    ///
    /// # Errors
    /// That of `write`, or of the disk.
    pub fn save_folder(&self, name: &str, write: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let folder = self.path.join(name);
        replace_folder(&folder, write)?;
        Ok(folder)
    }
}

/// Which checkpoints stay when another one is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Keep {
    /// So many of the newest.
    pub newest: usize,
    /// And the one of this step.
    pub best: Option<u64>,
}

/// Writes checkpoints on a thread of its own, one at a time, while the training goes on.
///
/// Dropped, it waits for the one that it is at.
#[derive(Debug)]
pub struct Saver {
    run: Arc<RunFolder>,
    writing: Option<JoinHandle<Result<PathBuf>>>,
}

impl Saver {
    /// One that has nothing to do yet.
    pub fn new(run: Arc<RunFolder>) -> Self {
        Self { run, writing: None }
    }

    /// Begins what [`RunFolder::save`] does, after the one before is through; gives that one's folder.
    ///
    /// # Errors
    /// Of the one before; then this one is not begun.
    pub fn begin(
        &mut self,
        step: u64,
        keep: Keep,
        write: impl FnOnce(&Path) -> Result<()> + Send + 'static,
    ) -> Result<Option<PathBuf>> {
        let before = self.wait()?;
        let run = Arc::clone(&self.run);
        let thread = thread::Builder::new().name("checkpoint".to_owned());
        self.writing =
            Some(thread.spawn(move || run.save(step, keep, write)).context("cannot start a thread for a checkpoint")?);
        Ok(before)
    }

    /// The folder of a save that has come to its end since the last call, and its error.
    ///
    /// # Errors
    /// That of the save.
    pub fn written(&mut self) -> Result<Option<PathBuf>> {
        if self.writing.as_ref().is_some_and(JoinHandle::is_finished) { self.wait() } else { Ok(None) }
    }

    /// As [`Self::written`], but waits for a save that is not through.
    ///
    /// # Errors
    /// That of the save.
    pub fn wait(&mut self) -> Result<Option<PathBuf>> {
        let Some(writing) = self.writing.take() else { return Ok(None) };
        let written = writing.join().map_err(|_| anyhow!("the thread that writes a checkpoint panicked"))?;
        written.map(Some)
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        if let Err(error) = self.wait() {
            tracing::warn!("{error:#}");
        }
    }
}

/// Makes `folder` whole or not at all.
fn replace_folder(folder: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let what = || format!("cannot write {}", folder.display());
    let parent = folder.parent().with_context(what)?;
    let beside = parent.join(format!(".tmp-{}", name_of(folder)));
    if beside.exists() {
        fs::remove_dir_all(&beside).with_context(what)?;
    }
    let written = fs::create_dir_all(&beside)
        .map_err(anyhow::Error::from)
        .and_then(|()| write(&beside))
        .and_then(|()| checksums::write(&beside));
    if let Err(error) = written {
        // What was written is worth nothing; a full disk gets its space back.
        let _ = fs::remove_dir_all(&beside);
        return Err(error).with_context(what);
    }
    if folder.exists() {
        let old = parent.join(format!(".tmp-old-{}", name_of(folder)));
        fs::rename(folder, &old).with_context(what)?;
        fs::rename(&beside, folder).with_context(what)?;
        fs::remove_dir_all(&old).with_context(what)?;
    } else {
        fs::rename(&beside, folder).with_context(what)?;
    }
    File::open(parent).and_then(|parent| parent.sync_all()).with_context(what)
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Compares every file of a checkpoint with its checksum.
///
/// # Errors
/// Names the first file that differs.
pub fn verify(folder: &Path) -> Result<()> {
    let listed = checksums::verify(folder)?;
    ensure!(
        listed.iter().any(|name| name == TRAINER_STATE),
        "{} is not a whole list of a checkpoint's files",
        folder.join(MANIFEST).display()
    );
    Ok(())
}

/// The checkpoints of a run by step, oldest first, unverified.
///
/// # Errors
/// Where the folder cannot be listed.
pub fn list(run: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let folder = run.join("checkpoints");
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let what = || format!("cannot read {}", folder.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder).with_context(what)? {
        let path = entry.with_context(what)?.path();
        if let Some(step) = name_of(&path).strip_prefix("step-").and_then(|n| n.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// The last checkpoint whose files are all as they were written; none in a run that has saved none.
///
/// A damaged one is logged with what is wrong, and the one before it is taken.
///
/// # Errors
/// Where every checkpoint is damaged: what is wrong with the last.
pub fn latest(run: &Path) -> Result<Option<PathBuf>> {
    let mut damage = None;
    for (_, folder) in list(run)?.into_iter().rev() {
        match verify(&folder) {
            Ok(()) => return Ok(Some(folder)),
            Err(error) => {
                tracing::warn!("{} is damaged and passed over: {error:#}", folder.display());
                damage = Some(error.context(format!("no checkpoint of {} is whole", run.display())));
            }
        }
    }
    damage.map_or(Ok(None), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(step: u64) -> impl FnOnce(&Path) -> Result<()> {
        move |folder| {
            fs::write(folder.join("optimizer.safetensors"), vec![step as u8; 1000])?;
            Ok(fs::write(folder.join(TRAINER_STATE), format!("{{\"step\": {step}}}"))?)
        }
    }

    fn newest(newest: usize) -> Keep {
        Keep { newest, best: None }
    }

    fn steps(run: &Path) -> Vec<u64> {
        list(run).unwrap().into_iter().map(|(step, _)| step).collect()
    }

    #[test]
    fn the_best_is_kept_beside_the_newest() {
        let run = tempfile::tempdir().unwrap();
        let folder = RunFolder::lock(run.path()).unwrap();
        for step in 1..=5 {
            folder.save(step, Keep { newest: 2, best: Some(2) }, fill(step)).unwrap();
        }
        assert_eq!(steps(run.path()), [2, 4, 5]);
        folder.save(6, newest(2), fill(6)).unwrap();
        assert_eq!(steps(run.path()), [5, 6]);
    }

    #[test]
    fn a_save_goes_on_beside_and_the_next_waits_and_hears_of_its_error() {
        let run = tempfile::tempdir().unwrap();
        let mut saver = Saver::new(Arc::new(RunFolder::lock(run.path()).unwrap()));
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let slow = move |folder: &Path| {
            wait.recv()?;
            fill(10)(folder)
        };
        assert_eq!(saver.begin(10, newest(3), slow).unwrap(), None);
        assert_eq!(saver.written().unwrap(), None);
        assert_eq!(steps(run.path()), [0; 0]);
        go.send(()).unwrap();
        let full = |_: &Path| Err(std::io::Error::from(std::io::ErrorKind::StorageFull).into());
        assert_eq!(saver.begin(20, newest(3), full).unwrap(), Some(run.path().join("checkpoints/step-10")));
        let error = format!("{:#}", saver.begin(30, newest(3), fill(30)).unwrap_err());
        assert!(error.contains("step-20") && error.contains("no storage space"), "{error}");
        assert_eq!(steps(run.path()), [10]);
        saver.begin(40, newest(3), fill(40)).unwrap();
        drop(saver);
        assert_eq!(steps(run.path()), [10, 40]);
        RunFolder::lock(run.path()).unwrap();
    }

    #[test]
    fn the_newest_are_kept_and_found() {
        let run = tempfile::tempdir().unwrap();
        let folder = RunFolder::lock(run.path()).unwrap();
        assert!(latest(run.path()).unwrap().is_none());
        for step in [5, 10, 100, 20] {
            folder.save(step, newest(2), fill(step)).unwrap();
        }
        assert_eq!(steps(run.path()), [20, 100]);
        let last = latest(run.path()).unwrap().unwrap();
        assert_eq!(fs::read_to_string(last.join(TRAINER_STATE)).unwrap(), "{\"step\": 100}");
        // Saved again over itself.
        folder.save(100, newest(2), fill(100)).unwrap();
        verify(&last).unwrap();
    }

    #[test]
    fn a_flipped_byte_in_any_file_is_named_and_the_one_before_is_used() {
        let run = tempfile::tempdir().unwrap();
        let folder = RunFolder::lock(run.path()).unwrap();
        let before = folder.save(10, newest(3), fill(10)).unwrap();
        let damaged = folder.save(20, newest(3), fill(20)).unwrap();
        for name in ["optimizer.safetensors", TRAINER_STATE, MANIFEST] {
            let path = damaged.join(name);
            let whole = fs::read(&path).unwrap();
            for at in [0, whole.len() / 2, whole.len() - 1] {
                let mut bytes = whole.clone();
                bytes[at] ^= 0x10;
                fs::write(&path, bytes).unwrap();
                let error = format!("{:#}", verify(&damaged).unwrap_err());
                assert!(error.contains("step-20"), "{name} at {at}: {error}");
                if name == "optimizer.safetensors" {
                    assert!(error.contains("checksum mismatch") && error.contains(name), "{error}");
                }
                assert_eq!(latest(run.path()).unwrap().unwrap(), before, "{name} at {at}");
            }
            fs::write(&path, whole).unwrap();
        }
        assert_eq!(latest(run.path()).unwrap().unwrap(), damaged);
        fs::remove_file(damaged.join("optimizer.safetensors")).unwrap();
        assert_eq!(latest(run.path()).unwrap().unwrap(), before);
        fs::remove_file(before.join(MANIFEST)).unwrap();
        let error = format!("{:#}", latest(run.path()).unwrap_err());
        assert!(error.contains("no checkpoint of") && error.contains("is whole"), "{error}");
    }

    #[test]
    fn a_save_cut_short_leaves_the_one_before() {
        let run = tempfile::tempdir().unwrap();
        let folder = RunFolder::lock(run.path()).unwrap();
        let before = folder.save(10, newest(3), fill(10)).unwrap();
        // As kill -9 leaves it: a folder beside its place.
        let beside = run.path().join("checkpoints/.tmp-step-20");
        fs::create_dir(&beside).unwrap();
        fs::write(beside.join("optimizer.safetensors"), b"half").unwrap();
        assert_eq!(latest(run.path()).unwrap().unwrap(), before);
        drop(folder);
        let folder = RunFolder::lock(run.path()).unwrap();
        assert!(!beside.exists());
        // As a full disk does it.
        let error = folder
            .save(20, newest(1), |folder| {
                fs::write(folder.join("optimizer.safetensors"), b"half")?;
                Err(std::io::Error::from(std::io::ErrorKind::StorageFull).into())
            })
            .unwrap_err();
        let error = format!("{error:#}");
        assert!(
            error.contains("cannot write") && error.contains("step-20") && error.contains("no storage space"),
            "{error}"
        );
        assert!(!beside.exists());
        assert_eq!(latest(run.path()).unwrap().unwrap(), before);
    }

    #[test]
    fn a_second_trainer_is_refused() {
        let run = tempfile::tempdir().unwrap();
        let first = RunFolder::lock(run.path()).unwrap();
        let error = RunFolder::lock(run.path()).unwrap_err().to_string();
        let expected = format!("in use by another trainer (process {})", std::process::id());
        assert!(error.contains(&expected), "{error}");
        drop(first);
        RunFolder::lock(run.path()).unwrap();
    }
}
