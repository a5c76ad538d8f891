//! Reading checkpoint files as views of mapped memory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use memmap2::MmapMut;
use tch::{Kind, Tensor};
use vora_files::refuse_compressed;
use vora_gguf::{Llm, TensorKind};

use crate::checkpoint::entry::Entry;
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::files::checkpoint_files;
use crate::checkpoint::{gguf, safetensors};
use crate::map::{self, map, view};
use crate::packed::PackedLinear;

/// One mapped file, and what a GGUF file has in it.
#[derive(Debug)]
struct Mapped {
    path: PathBuf,
    map: Arc<MmapMut>,
    gguf: Option<Llm<map::Mapped>>,
}

/// The tensors of one checkpoint, by name; nothing is read until a tensor is asked for.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<Mapped>,
    entries: BTreeMap<String, Entry>,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, a folder with `model.safetensors` or, where that is not there,
    /// `model.safetensors.index.json`, or the GGUF file of a language model ([`vora_gguf::folder::find`]) under HF's names.
    ///
    /// # Errors
    /// Name the file and what is wrong with it, see [`CheckpointError`]; pickle files are refused by name.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of_files(path, &checkpoint_files(path)?)
    }

    /// Opens files that hold the tensors of one checkpoint together; `path` is what it is known by.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and where two of them have a tensor of the same name.
    pub fn of_files(path: &Path, files: &[PathBuf]) -> Result<Self> {
        let mut checkpoint = Self { path: path.to_owned(), files: Vec::new(), entries: BTreeMap::new() };
        for file in files {
            checkpoint.add(file)?;
        }
        Ok(checkpoint)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let map = map(path)?;
        let in_file = || format!("reading {}", path.display());
        let is_gguf = map.starts_with(b"GGUF") || path.extension().is_some_and(|extension| extension == "gguf");
        let gguf = is_gguf.then(|| gguf::open(&map)).transpose().with_context(in_file)?;
        let entries = match &gguf {
            Some(model) => gguf::entries(model).with_context(in_file)?,
            None => safetensors::entries(&map)
                // By chance a whole file may begin like a compressed one.
                .or_else(|error| refuse_compressed(path, &map, "weights are read as they are").and(Err(error)))
                .with_context(|| CheckpointError::Broken(path.to_owned()))?,
        };
        let file_idx = self.files.len();
        for (name, entry) in entries {
            if let Some(other) = self.entries.insert(name.clone(), Entry { file_idx, ..entry }) {
                let other = self.files[other.file_idx].path.display();
                bail!("tensor `{name}` is in {other} and again in {}", path.display());
            }
        }
        self.files.push(Mapped { path: path.to_owned(), map, gguf });
        Ok(())
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Dtype and shape of a tensor.
    pub fn info(&self, name: &str) -> Option<(Kind, &[i64])> {
        self.entries.get(name).map(|e| (e.kind, e.shape.as_slice()))
    }

    /// A tensor that a GGUF file has in blocks of few bits, and their kind; none where there is none.
    pub fn quantised(&self) -> Option<(&str, TensorKind)> {
        self.entries.iter().find_map(|(name, entry)| {
            let kind = self.files[entry.file_idx].gguf.as_ref()?.info(name)?.kind();
            let plain = matches!(kind, TensorKind::F32 | TensorKind::F16 | TensorKind::BF16);
            (!plain).then_some((name.as_str(), kind))
        })
    }

    /// The tensor as it lies in the file: on the CPU, a view of the mapped memory.
    ///
    /// What a GGUF file has in blocks of few bits, or its rows in another order, is a new tensor.
    ///
    /// # Errors
    /// Where there is no such tensor, or libtorch has no room for it.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let entry = self.entry(name)?;
        match &entry.range {
            Some(range) => view(&self.files[entry.file_idx].map, range.clone(), &entry.shape, entry.kind),
            None => self.dequantise(name, entry, entry.kind),
        }
    }

    /// As [`Checkpoint::tensor`], in `kind`; what has to be dequantised takes no way round by f32.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub fn tensor_as(&self, name: &str, kind: Kind) -> Result<Tensor> {
        let entry = self.entry(name)?;
        match entry.range {
            Some(_) => Ok(self.tensor(name)?.to_kind(kind)),
            None => self.dequantise(name, entry, kind),
        }
    }

    /// The matrix of this name where a GGUF file has it in the blocks that decoding reads: Q8_0 or Q4_0.
    pub(crate) fn packed(&self, name: &str, shape: [i64; 2]) -> Result<Option<PackedLinear>> {
        let Some(entry) = self.entries.get(name).filter(|entry| entry.shape == shape) else { return Ok(None) };
        let Some(model) = &self.files[entry.file_idx].gguf else { return Ok(None) };
        gguf::packed(model, name, shape).with_context(|| format!("reading {name} of {}", self.path.display()))
    }

    /// Gives back the memory that this tensor's bytes in the file were read into; whoever reads them again has the file
    /// read again.
    pub(crate) fn forget(&self, name: &str) {
        if let Some(Entry { file_idx, range: Some(range), .. }) = self.entries.get(name) {
            map::forget(&self.files[*file_idx].map, range.clone());
        }
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        let none = || CheckpointError::NoTensor { path: self.path.clone(), name: name.to_owned() };
        Ok(self.entries.get(name).ok_or_else(none)?)
    }

    fn dequantise(&self, name: &str, entry: &Entry, kind: Kind) -> Result<Tensor> {
        let model = self.files[entry.file_idx].gguf.as_ref().expect("only a GGUF file has tensors without a range");
        gguf::dequantise(model, name, &entry.shape, kind)
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::checkpoint::save;
    use crate::checkpoint::write::tests::example;

    #[test]
    fn what_is_saved_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        save(&path, &example(), &[("step", "7")]).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.names().count(), 5);
        for (name, tensor) in example() {
            let read = checkpoint.tensor(&name).unwrap();
            assert_eq!((read.kind(), read.size()), (tensor.kind(), tensor.size()), "{name}");
            assert!(read.equal(&tensor), "{name}");
        }
        // Only the file is left: the temporary one was renamed.
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_view_outlives_its_checkpoint_and_never_changes_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        save(&path, &example(), &[]).unwrap();
        let mut view = Checkpoint::open(&path).unwrap().tensor("b.weight").unwrap();
        let _ = view.fill_(9.0);
        assert_eq!(view.double_value(&[1, 2]), 9.0);
        let again = Checkpoint::open(&path).unwrap().tensor("b.weight").unwrap();
        assert_eq!(again.double_value(&[1, 2]), 6.0);
    }

    #[test]
    fn truncated_anywhere_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let large = ("large".to_owned(), fixtures::Random::new(1).normal([64, 64]));
        for (tensors, step) in [(example(), 7), (vec![large], 1024)] {
            save(&path, &tensors, &[]).unwrap();
            let whole = std::fs::read(&path).unwrap();
            for len in (0..whole.len()).step_by(step) {
                std::fs::write(&path, &whole[..len]).unwrap();
                let error = Checkpoint::open(&path).unwrap_err().to_string();
                assert!(error.contains("x.safetensors"), "{len}: {error}");
            }
        }
    }

    /// A file with this header before `data` zeros.
    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    #[test]
    fn hostile_headers_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let claims = |len: u64| [&len.to_le_bytes()[..], b"{}      "].concat();
        let one =
            |shape: &str, end: &str| format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{end}]}}}}"#);
        let two = |b: &str, start: usize, end: usize| {
            format!(
                r#"{{"a":{{"dtype":"F32","shape":[2],"data_offsets":[0,8]}},"{b}":{{"dtype":"F32","shape":[2],"data_offsets":[{start},{end}]}}}}"#
            )
        };
        let cases = [
            (claims(u64::MAX), "header"),
            (claims(1 << 30), "header too large"),
            (claims(99_000_000), "header"),
            (file(&one("[4]", "8"), 8), "invalid shape, data type, or offset"),
            (file(&one("[2]", "8"), 4), "not fully covered"),
            (file(&one("[2]", "8"), 16), "not fully covered"),
            (file(&one("[2]", "18446744073709551616"), 8), "JSON"),
            (file(&one("[9223372036854775807,9223372036854775807]", "8"), 8), "overflow"),
            (
                file(&one("[0,4611686018427387904,4]", "0"), 0),
                "tensor `a`: its shape [0, 4611686018427387904, 4] overflows",
            ),
            (
                file(&one("[0,18446744073709551615]", "0"), 0),
                "tensor `a`: its shape [0, 18446744073709551615] overflows",
            ),
            (file(&two("b", 4, 12), 12), "`b`"),
            (file(&two("b", 12, 20), 20), "`b`"),
            (file(&two("a", 0, 8), 8), "two tensors are named `a`"),
            (
                file(&one("[2]", "8").replace("F32", "F8_E4M3").replace("[2]", "[8]"), 8),
                "dtype F8_E4M3 is not supported",
            ),
            (file("not json", 0), "JSON"),
            (b"PK\x03\x04 a zip of pickles".to_vec(), "x.safetensors is compressed (zip), and weights are"),
        ];
        for (i, (bytes, says)) in cases.iter().enumerate() {
            std::fs::write(&path, bytes).unwrap();
            let error = format!("{:#}", Checkpoint::open(&path).unwrap_err());
            let named = error.contains("x.safetensors is not a whole safetensors file: ");
            assert!(named && error.to_lowercase().contains(&says.to_lowercase()), "case {i}: {error}");
        }
    }

    /// What a fuzzer would do first, on every byte of the header.
    #[test]
    fn no_altered_byte_makes_it_panic() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        save(&path, &example(), &[]).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let header = 8 + usize::from_le_bytes(whole[..8].try_into().unwrap());
        let mut bytes = whole.clone();
        let mut read = 0;
        for at in 0..header {
            for value in [0, b'0', b'9', b'"', b',', 0xff] {
                bytes[at] = value;
                // A new file each time: truncating one that is still mapped would be our own fault.
                std::fs::remove_file(&path).unwrap();
                std::fs::write(&path, &bytes).unwrap();
                if let Ok(checkpoint) = Checkpoint::open(&path) {
                    for name in checkpoint.names() {
                        let _ = checkpoint.tensor(name).unwrap().to_kind(Kind::Float).sum(Kind::Float);
                        read += 1;
                    }
                }
            }
            bytes[at] = whole[at];
        }
        assert!(read > 0, "some alterations, as those of a name, leave a good file");
    }

    #[test]
    fn shards_are_one_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (example()[..2].to_vec_of(), example()[2..].to_vec_of());
        save(&folder.path().join("model-00001-of-00002.safetensors"), &one, &[]).unwrap();
        save(&folder.path().join("model-00002-of-00002.safetensors"), &two, &[]).unwrap();
        let map: serde_json::Map<String, serde_json::Value> = [(&one, 1), (&two, 2)]
            .iter()
            .flat_map(|(list, i)| {
                list.iter().map(move |(n, _)| (n.clone(), format!("model-0000{i}-of-00002.safetensors").into()))
            })
            .collect();
        let index = serde_json::json!({"metadata": {}, "weight_map": map});
        std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a.ids", "b.weight", "c.half", "d.scalar", "e.empty"]);

        let escape = serde_json::json!({"weight_map": {"a": "../../etc/passwd"}});
        std::fs::write(folder.path().join("model.safetensors.index.json"), escape.to_string()).unwrap();
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("names no file of this folder"), "{error}");
    }

    #[test]
    fn a_single_file_goes_before_an_index() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, value: i64| {
            let tensor = Tensor::full([2], value, (Kind::Int64, Device::Cpu));
            save(&folder.path().join(name), &[("a".to_owned(), tensor)], &[]).unwrap();
        };
        let read = || Checkpoint::open(folder.path()).map(|c| c.tensor("a").unwrap().int64_value(&[0]));
        let index = serde_json::json!({"weight_map": {"a": "model-00001-of-00001.safetensors"}});
        std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        write("model-00001-of-00001.safetensors", 1);
        assert_eq!(read().unwrap(), 1);
        write("model.safetensors", 2);
        assert_eq!(read().unwrap(), 2);
        std::fs::remove_file(folder.path().join("model-00001-of-00001.safetensors")).unwrap();
        assert_eq!(read().unwrap(), 2);
        std::fs::write(folder.path().join("model.safetensors.index.json"), "not JSON").unwrap();
        assert_eq!(read().unwrap(), 2);
        std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
        read().unwrap_err();
    }

    #[test]
    fn pickles_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("pytorch_model.bin"), b"x").unwrap();
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("pytorch_model.bin") && error.contains("convert"), "{error}");
        for name in ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl"] {
            let error = Checkpoint::open(&folder.path().join(name)).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("pickle"), "{error}");
        }
        let index = serde_json::json!({"weight_map": {"a": "pytorch_model.bin"}});
        std::fs::write(folder.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("pytorch_model.bin is a pickle file"), "{error}");
    }

    /// Shallow copies of a list of named tensors.
    trait ToVecOf {
        fn to_vec_of(&self) -> Vec<(String, Tensor)>;
    }
    impl ToVecOf for [(String, Tensor)] {
        fn to_vec_of(&self) -> Vec<(String, Tensor)> {
            self.iter().map(|(n, t)| (n.clone(), t.shallow_clone())).collect()
        }
    }
}
