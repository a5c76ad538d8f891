//! The teacher's features of pictures that come again, kept on disk: a folder a teacher, a file a picture.
//!
//! Features are kept as they were computed, bit for bit. A file tells by a checksum whether it is whole; one that is
//! not is computed again and told of.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};
use vora_torch::checkpoint::{Checkpoint, save};

/// The cache of one teacher: the same weights, blocks, dtype and type of device.
#[derive(Debug)]
pub(crate) struct TeacherCache {
    folder: PathBuf,
    kind: Kind,
    device: Device,
    writes: AtomicBool, // until the disk refuses
}

impl TeacherCache {
    /// A cache below `folder` for these hidden states of the teacher in `teacher`, which sees pictures by `view`; reads all of
    /// its weights once, to know them again.
    ///
    /// # Errors
    /// Where the teacher cannot be read, or a folder cannot be made.
    pub(crate) fn open(
        folder: &Path,
        teacher: &Path,
        view: &str,
        states: &[usize],
        device: Device,
        kind: Kind,
    ) -> Result<Self> {
        let place = if device.is_cuda() { "cuda" } else { "cpu" };
        let mut hash = Sha256::new();
        hash.update(format!("states {states:?}, {kind:?}, {place}{view}\n"));
        for file in identity_files(teacher)? {
            let what = || format!("cannot read {}", file.display());
            std::io::copy(&mut File::open(&file).with_context(what)?, &mut hash).with_context(what)?;
        }
        let folder = folder.join(&hex(hash)[..16]);
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
        Ok(Self { folder, kind, device, writes: AtomicBool::new(true) })
    }

    /// Each block's features of `pictures`, `[n, 3, height, width]` -> `[n, patches, teacher_hidden]`: those that are
    /// kept, and for the other pictures together what `compute` makes of them, which is kept from now on.
    pub(crate) fn features(&self, pictures: &Tensor, compute: impl Fn(&Tensor) -> Vec<Tensor>) -> Vec<Tensor> {
        let files: Vec<PathBuf> = pictures.unbind(0).iter().map(|picture| self.file(picture)).collect();
        let mut found: Vec<Option<Tensor>> = files.iter().map(|file| self.read(file)).collect();
        let missing: Vec<usize> = (0..files.len()).filter(|&i| found[i].is_none()).collect();
        if !missing.is_empty() {
            let rows = Tensor::from_slice(&missing.iter().map(|&i| i as i64).collect::<Vec<_>>());
            let computed = compute(&pictures.index_select(0, &rows.to_device(pictures.device())));
            let computed = Tensor::stack(&computed, 1); // [missing, blocks, patches, teacher_hidden]
            for (features, &i) in computed.unbind(0).into_iter().zip(&missing) {
                self.write(&files[i], &features);
                found[i] = Some(features);
            }
        }
        let found: Vec<Tensor> = found.into_iter().flatten().collect();
        Tensor::stack(&found, 1).unbind(0)
    }

    /// Where a picture's features lie.
    fn file(&self, picture: &Tensor) -> PathBuf {
        let mut hash = Sha256::new();
        hash.update(format!("{:?}", picture.size()));
        hash.update(bytes(picture));
        let name = hex(hash);
        self.folder.join(&name[..2]).join(format!("{name}.safetensors"))
    }

    /// `[blocks, patches, teacher_hidden]`; none where there is no file, or none that is whole.
    fn read(&self, file: &Path) -> Option<Tensor> {
        if !file.exists() {
            return None;
        }
        match self.try_read(file) {
            Ok(features) => Some(features.to_device(self.device)),
            Err(error) => {
                tracing::warn!("{} is damaged and is computed again: {error:#}", file.display());
                None
            }
        }
    }

    fn try_read(&self, file: &Path) -> Result<Tensor> {
        let entry = Checkpoint::open(file)?;
        let (features, sha256) = (entry.tensor("features")?, entry.tensor("sha256")?);
        ensure!(features.kind() == self.kind, "its features are {:?}, not {:?}", features.kind(), self.kind);
        ensure!(bytes(&sha256) == Sha256::digest(bytes(&features))[..], "its checksum is another one");
        Ok(features.copy()) // the map of the file is closed again
    }

    /// Keeps features; where the disk refuses, nothing more is written.
    fn write(&self, file: &Path, features: &Tensor) {
        if !self.writes.load(Ordering::Relaxed) {
            return;
        }
        let features = features.contiguous();
        let sha256 = Tensor::from_slice(&Sha256::digest(bytes(&features)));
        let tensors = [("features".to_owned(), features), ("sha256".to_owned(), sha256)];
        let parent = file.parent().unwrap_or(&self.folder);
        let written = std::fs::create_dir_all(parent).map_err(Into::into).and_then(|()| save(file, &tensors, &[]));
        if let Err(error) = written {
            self.writes.store(false, Ordering::Relaxed);
            tracing::warn!("no more of the teacher's features are kept in {}: {error:#}", self.folder.display());
        }
    }
}

/// What makes a teacher the one that it is: its configs and weights, by name.
fn identity_files(teacher: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(teacher).with_context(|| format!("cannot list {}", teacher.display()))? {
        let path = entry.with_context(|| format!("cannot list {}", teacher.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors" || extension == "json") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of a tensor's elements.
fn bytes(tensor: &Tensor) -> Vec<u8> {
    let flat = tensor.to_device(Device::Cpu).contiguous().view([-1]).view_dtype(Kind::Uint8);
    Vec::try_from(flat).expect("a list of bytes")
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Two blocks of features that tell the picture, and which pictures were computed.
    fn compute(seen: &RefCell<Vec<i64>>) -> impl Fn(&Tensor) -> Vec<Tensor> {
        move |pictures| {
            seen.borrow_mut().push(pictures.size()[0]);
            let rows = pictures.flatten(1, -1).narrow(1, 0, 6).view([-1, 2, 3]);
            vec![(&rows * 0.3).to_kind(Kind::BFloat16), (&rows * 0.7).to_kind(Kind::BFloat16)]
        }
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let list = |folder: &Path| std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect::<Vec<_>>();
        list(folder).iter().flat_map(|teacher| list(teacher)).flat_map(|shard| list(&shard)).collect()
    }

    fn open(folder: &Path, blocks: &[usize]) -> TeacherCache {
        let teacher = fixtures::root().join("tiny/dinov2");
        TeacherCache::open(folder, &teacher, "", blocks, Device::Cpu, Kind::BFloat16).unwrap()
    }

    #[test]
    fn a_hit_is_what_was_computed_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let pictures = fixtures::Random::new(1).normal([3, 3, 4, 4]);
        let seen = RefCell::new(Vec::new());
        let expected = compute(&seen)(&pictures);
        seen.borrow_mut().clear();
        let same = |found: &[Tensor]| {
            assert_eq!(found.len(), expected.len());
            assert!(found.iter().zip(&expected).all(|(a, b)| a.kind() == b.kind() && a.equal(b)));
        };
        let cache = open(folder.path(), &[0, 1]);
        cache.features(&pictures.narrow(0, 1, 1), compute(&seen));
        same(&cache.features(&pictures, compute(&seen))); // one is kept, two are new
        same(&open(folder.path(), &[0, 1]).features(&pictures, compute(&seen)));
        assert_eq!((seen.borrow().as_slice(), files(folder.path()).len()), ([1, 2].as_slice(), 3));
        // With other blocks it is another teacher.
        open(folder.path(), &[0, 2]).features(&pictures, compute(&seen));
        assert_eq!(seen.borrow().last(), Some(&3));
    }

    #[test]
    fn a_damaged_file_is_computed_again() {
        let folder = tempfile::tempdir().unwrap();
        let pictures = fixtures::Random::new(2).normal([2, 3, 4, 4]);
        let seen = RefCell::new(Vec::new());
        let cache = open(folder.path(), &[0, 1]);
        let expected = cache.features(&pictures, compute(&seen));
        let [flipped, cut] = &files(folder.path())[..] else { panic!("two files") };
        let mut content = std::fs::read(flipped).unwrap();
        *content.last_mut().unwrap() ^= 1;
        std::fs::write(flipped, content).unwrap();
        std::fs::write(cut, &std::fs::read(cut).unwrap()[..40]).unwrap();
        let found = cache.features(&pictures, compute(&seen));
        assert!(found.iter().zip(&expected).all(|(a, b)| a.equal(b)));
        cache.features(&pictures, compute(&seen));
        assert_eq!(seen.borrow().as_slice(), [2, 2]);
    }

    #[test]
    fn a_disk_that_refuses_stops_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let pictures = fixtures::Random::new(2).normal([2, 3, 4, 4]);
        let seen = RefCell::new(Vec::new());
        let cache = open(folder.path(), &[0, 1]);
        std::fs::remove_dir_all(&cache.folder).unwrap();
        std::fs::write(&cache.folder, "a file in its place").unwrap();
        let expected = compute(&seen)(&pictures);
        let found = cache.features(&pictures, compute(&seen));
        assert!(found.iter().zip(&expected).all(|(a, b)| a.equal(b)) && !cache.writes.load(Ordering::Relaxed));
    }
}
