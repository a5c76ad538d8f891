//! A checkpoint parted into files of limited size, as HF's `save_pretrained` parts one.

use std::path::Path;

use anyhow::Result;
use serde_json::{Map, Value, json};
use tch::Tensor;
use vora_files::write_bytes;

use crate::checkpoint::write::{TensorInfo, save_each};

/// Which file each tensor of a checkpoint goes into.
#[derive(Debug)]
pub struct Shards {
    files: Vec<Shard>,
}

/// One file, and what goes into it.
#[derive(Debug)]
#[non_exhaustive]
pub struct Shard {
    /// `model.safetensors` where there is one file, else `model-00001-of-00003.safetensors`.
    pub file: String,
    /// Its tensors.
    pub tensors: Vec<TensorInfo>,
}

impl Shard {
    /// Bytes of its tensors.
    pub fn num_bytes(&self) -> u64 {
        self.tensors.iter().map(TensorInfo::num_bytes).sum()
    }
}

impl Shards {
    /// Parts `tensors` in their order: a file ends before the tensor that would carry it beyond `max_bytes`. A tensor
    /// larger than that has a file of its own.
    pub fn new(tensors: Vec<TensorInfo>, max_bytes: u64) -> Self {
        let mut parts: Vec<Vec<TensorInfo>> = vec![Vec::new()];
        let mut size = 0;
        for tensor in tensors {
            let bytes = tensor.num_bytes();
            if size + bytes > max_bytes && !parts[parts.len() - 1].is_empty() {
                parts.push(Vec::new());
                size = 0;
            }
            size += bytes;
            let last = parts.len() - 1;
            parts[last].push(tensor);
        }
        let num = parts.len();
        let file = |idx: usize| match num {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{num:05}.safetensors", idx + 1),
        };
        let files = parts.into_iter().enumerate().map(|(idx, tensors)| Shard { file: file(idx), tensors });
        Self { files: files.collect() }
    }

    /// The files, in order.
    pub fn files(&self) -> &[Shard] {
        &self.files
    }

    /// Writes the files into `folder`, and `model.safetensors.index.json` where there are several. Tensors are asked for
    /// by name, one by one, see [`save_each`].
    ///
    /// # Errors
    /// As [`save_each`], or where the folder cannot be written to.
    pub fn write(&self, folder: &Path, mut tensor: impl FnMut(&str) -> Result<Tensor>) -> Result<()> {
        for shard in &self.files {
            save_each(&folder.join(&shard.file), &shard.tensors, &[], &mut tensor)?;
        }
        if self.files.len() == 1 {
            return Ok(());
        }
        let places = self.files.iter().flat_map(|s| s.tensors.iter().map(|t| (t.name.clone(), s.file.clone().into())));
        let weight_map: Map<String, Value> = places.collect();
        let total_size: u64 = self.files.iter().map(Shard::num_bytes).sum();
        let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
        write_bytes(&folder.join("model.safetensors.index.json"), serde_json::to_string_pretty(&index)?.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use tch::Kind;

    fn tensors() -> Vec<(String, Tensor)> {
        let lens = [("a", 2i64), ("b", 3), ("c", 9), ("d", 1), ("e", 4)];
        lens.map(|(name, len)| (name.to_owned(), Tensor::arange(len, (Kind::Int64, tch::Device::Cpu)))).into()
    }

    fn infos() -> Vec<TensorInfo> {
        tensors().iter().map(|(name, tensor)| TensorInfo::of(name, tensor).unwrap()).collect()
    }

    #[test]
    fn a_file_ends_before_it_is_too_large() {
        let parts = |max_bytes| {
            let shards = Shards::new(infos(), max_bytes);
            let names = |shard: &Shard| shard.tensors.iter().map(|t| t.name.as_str()).collect::<String>();
            shards.files().iter().map(names).collect::<Vec<_>>()
        };
        assert_eq!(parts(1000), ["abcde"]);
        assert_eq!(parts(19 * 8), ["abcde"]);
        assert_eq!(parts(19 * 8 - 1), ["abcd", "e"]);
        assert_eq!(parts(5 * 8), ["ab", "c", "de"]);
        assert_eq!(parts(1), ["a", "b", "c", "d", "e"]);
        assert_eq!(Shards::new(Vec::new(), 1).files().len(), 1);
    }

    #[test]
    fn what_is_parted_is_one_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let tensors: std::collections::HashMap<String, Tensor> = tensors().into_iter().collect();
        Shards::new(infos(), 5 * 8).write(folder.path(), |name| Ok(tensors[name].shallow_clone())).unwrap();
        assert!(folder.path().join("model-00003-of-00003.safetensors").exists());
        let index = std::fs::read(folder.path().join("model.safetensors.index.json")).unwrap();
        let index: Value = serde_json::from_slice(&index).unwrap();
        assert_eq!(index["metadata"]["total_size"], 19 * 8);
        assert_eq!(index["weight_map"]["c"], "model-00002-of-00003.safetensors");
        let read = Checkpoint::open(folder.path()).unwrap();
        assert_eq!(read.names().count(), tensors.len());
        for (name, tensor) in &tensors {
            assert!(read.tensor(name).unwrap().equal(tensor), "{name}");
        }
    }
}
