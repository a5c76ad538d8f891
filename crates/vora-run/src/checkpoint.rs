//! Checkpoints that a crash cannot halve: written beside their place, checksummed, synced, renamed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, bail, ensure};
use vora_files::checksums::{self, MANIFEST};

use crate::metrics::RANK_METRICS;

/// Where the trainer stands: the file that every checkpoint has.
pub const TRAINER_STATE: &str = "trainer_state.json";

/// The folder of what a run trained, once it is through.
pub const FINAL: &str = "final";

/// What a run writes beside its checkpoints, its log and its events.
const RESULTS: [&str; 7] =
    [FINAL, "samples", "block_maps", "eval.json", "train_results.json", "loss.svg", "report.html"];

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

    /// Whether a run came to its end here, or something else lies where it would write what it trained.
    pub fn has_final(&self) -> bool {
        fs::read_dir(self.path.join(FINAL)).is_ok_and(|mut entries| entries.next().is_some())
    }

    /// Removes what the last run left here: a new run takes the folder. Files that no run writes stay.
    ///
    /// # Errors
    /// Names what cannot be removed.
    pub fn clear(&self) -> Result<()> {
        let folders = list(&self.path)?.into_iter().map(|(_, folder)| folder);
        let of_the_run = RESULTS.iter().map(|name| self.path.join(name));
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten().map(|entry| entry.path());
        let of_ranks = entries.filter(|path| name_of(path).starts_with(RANK_METRICS));
        for path in folders.chain(of_the_run).chain(of_ranks) {
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
        self.keep_only(keep)?;
        Ok(folder)
    }

    /// Makes the folder beside its place that several processes write a checkpoint into, each its share; one of them makes it.
    ///
    /// # Errors
    /// Of the disk.
    pub fn begin_shared(&self, step: u64) -> Result<()> {
        let beside = self.shared(step);
        let what = || format!("cannot write {}", beside.display());
        if beside.exists() {
            fs::remove_dir_all(&beside).with_context(what)?;
        }
        fs::create_dir_all(&beside).with_context(what)
    }

    /// Where processes write their shares of a step's checkpoint.
    pub fn shared(&self, step: u64) -> PathBuf {
        beside(&self.checkpoint(step))
    }

    /// Ends a checkpoint whose shares are all written: `digests` are the checksums of its files, as those found them who
    /// wrote them. As with [`Self::save`] it is there whole or not at all, and older ones go.
    ///
    /// # Errors
    /// Of the disk, and where a file is there that nobody told of, or lacks.
    pub fn end_shared(&self, step: u64, keep: Keep, digests: &BTreeMap<String, String>) -> Result<PathBuf> {
        let folder = self.checkpoint(step);
        let what = || format!("cannot write {}", folder.display());
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(self.shared(step)).with_context(what)? {
            found.insert(entry.with_context(what)?.file_name().to_string_lossy().into_owned());
        }
        let odd = found.iter().find(|name| !digests.contains_key(*name));
        let odd = odd.or_else(|| digests.keys().find(|name| !found.contains(*name)));
        if let Some(odd) = odd {
            bail!("{}: the processes that wrote it do not agree about {odd}", what());
        }
        checksums::write_list(&self.shared(step), digests).with_context(what)?;
        put_in_place(&folder)?;
        self.keep_only(keep)?;
        Ok(folder)
    }

    /// Removes all checkpoints but those that `keep` names.
    fn keep_only(&self, keep: Keep) -> Result<()> {
        let old = list(&self.path)?.into_iter().rev().skip(keep.newest.max(1));
        for (_, old) in old.filter(|(step, _)| keep.best != Some(*step)) {
            // First out of sight, so that no half-removed checkpoint is ever found.
            let gone = self.checkpoints().join(format!(".tmp-old-{}", name_of(&old)));
            fs::rename(&old, &gone).with_context(|| format!("cannot remove {}", old.display()))?;
            fs::remove_dir_all(&gone).with_context(|| format!("cannot remove {}", gone.display()))?;
        }
        Ok(())
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

/// This process's share of a checkpoint that several write together, on its way to the disk on a thread of its own.
///
/// Dropped, it waits for the thread.
#[derive(Debug)]
pub struct Share {
    /// The step of the checkpoint.
    pub step: u64,
    /// Which checkpoints are to stay.
    pub keep: Keep,
    writing: Option<JoinHandle<Result<BTreeMap<String, String>>>>,
}

impl Share {
    /// Begins: `write` writes files into [`RunFolder::shared`] and tells their names.
    ///
    /// # Errors
    /// Where no thread can be started.
    pub fn begin(
        run: &RunFolder,
        step: u64,
        keep: Keep,
        write: impl FnOnce(&Path) -> Result<Vec<String>> + Send + 'static,
    ) -> Result<Self> {
        let folder = run.shared(step);
        let work = move || {
            let names = write(&folder).with_context(|| format!("cannot write {}", folder.display()))?;
            let digest = |name: String| Ok((name.clone(), checksums::digest_of(&folder.join(name))?));
            names.into_iter().map(digest).collect()
        };
        let thread = thread::Builder::new().name("checkpoint".to_owned());
        let writing = thread.spawn(work).context("cannot start a thread for a checkpoint")?;
        Ok(Self { step, keep, writing: Some(writing) })
    }

    /// Whether it is on the disk, or was given up.
    pub fn is_written(&self) -> bool {
        self.writing.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for it: the checksums of its files.
    ///
    /// # Errors
    /// What `write` said.
    pub fn written(mut self) -> Result<BTreeMap<String, String>> {
        let writing = self.writing.take().context("a share is waited for once")?;
        writing.join().map_err(|_| anyhow!("the thread that writes a checkpoint panicked"))?
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        if let Some(writing) = self.writing.take() {
            drop(writing.join());
        }
    }
}

/// Makes `folder` whole or not at all.
fn replace_folder(folder: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let what = || format!("cannot write {}", folder.display());
    let beside = beside(folder);
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
    put_in_place(folder)
}

/// Where a folder is written before it takes its place.
fn beside(folder: &Path) -> PathBuf {
    folder.with_file_name(format!(".tmp-{}", name_of(folder)))
}

/// Gives what was written beside a folder's place that place.
fn put_in_place(folder: &Path) -> Result<()> {
    let what = || format!("cannot write {}", folder.display());
    let (parent, beside) = (folder.parent().with_context(what)?, beside(folder));
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
    fn a_checkpoint_in_shares_is_there_once_all_are_written() {
        let run = tempfile::tempdir().unwrap();
        let folder = RunFolder::lock(run.path()).unwrap();
        folder.save(10, newest(2), fill(10)).unwrap();
        let other = RunFolder::of_others(run.path());
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let begin = || {
            folder.begin_shared(20).unwrap();
            let first = move |folder: &Path| {
                fill(20)(folder)?;
                Ok(names(&["optimizer.safetensors", TRAINER_STATE]))
            };
            let second = move |folder: &Path| {
                fs::write(folder.join("second"), b"its share")?;
                Ok(names(&["second"]))
            };
            let shares = [Share::begin(&folder, 20, newest(1), first), Share::begin(&other, 20, newest(1), second)];
            shares.map(|share| share.unwrap().written().unwrap())
        };
        let [mut all, second] = begin();
        let error = format!("{:#}", folder.end_shared(20, newest(1), &all).unwrap_err());
        assert!(error.contains("do not agree about second"), "{error}");
        assert_eq!(steps(run.path()), [10]); // a crash here leaves the one before
        RunFolder::of_others(run.path());
        all.extend(second);
        let last = folder.end_shared(20, newest(1), &all).unwrap();
        assert_eq!((steps(run.path()), latest(run.path()).unwrap().unwrap()), (vec![20], last.clone()));
        verify(&last).unwrap();
        fs::write(last.join("second"), b"it5 share").unwrap();
        assert!(format!("{:#}", verify(&last).unwrap_err()).contains("second"));
        // Again over itself, after a share that was never ended, and one that fails.
        begin();
        let [mut all, second] = begin();
        all.extend(second);
        verify(&folder.end_shared(20, newest(1), &all).unwrap()).unwrap();
        folder.begin_shared(30).unwrap();
        let full = |_: &Path| Err(std::io::Error::from(std::io::ErrorKind::StorageFull).into());
        let share = Share::begin(&other, 30, newest(1), full).unwrap();
        let error = format!("{:#}", share.written().unwrap_err());
        assert!(error.contains(".tmp-step-30") && error.contains("no storage space"), "{error}");
        drop(folder);
        RunFolder::lock(run.path()).unwrap();
        assert!(!run.path().join("checkpoints/.tmp-step-30").exists());
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
