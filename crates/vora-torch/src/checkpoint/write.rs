//! Writing safetensors files, so that a crash leaves no half one.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};
use vora_files::write_atomically;

use crate::checkpoint::safetensors::dtype_of;
use crate::error;

/// What the header of a file says of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// The dtype of its elements.
    pub kind: Kind,
    /// Its dimensions.
    pub shape: Vec<i64>,
}

impl TensorInfo {
    /// What is to be said of this tensor.
    ///
    /// # Errors
    /// Where its dtype is none that tch knows.
    pub fn of(name: &str, tensor: &Tensor) -> Result<Self> {
        let kind = tensor.f_kind().map_err(error::clean).with_context(|| format!("tensor `{name}`"))?;
        Ok(Self { name: name.to_owned(), kind, shape: tensor.size() })
    }

    /// Bytes of the tensor.
    pub fn num_bytes(&self) -> u64 {
        self.shape.iter().product::<i64>() as u64 * self.kind.elt_size_in_bytes() as u64
    }
}

/// The bytes of a contiguous tensor on the CPU.
fn bytes_of(tensor: &Tensor) -> &[u8] {
    let len = tensor.numel() * tensor.kind().elt_size_in_bytes();
    if len == 0 {
        return &[];
    }
    // SAFETY: a contiguous CPU tensor of `len` bytes, borrowed as long as they are.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>().cast_const(), len) }
}

/// Writes `tensors` to `path` atomically: beside its place, synced, renamed. `{"format": "pt"}` is added to the
/// metadata, as HF transformers asks for.
///
/// # Errors
/// Where the file cannot be written, or safetensors has no dtype for a tensor.
pub fn save(path: &Path, tensors: &[(String, Tensor)], metadata: &[(&str, &str)]) -> Result<()> {
    let infos: Vec<TensorInfo> = tensors
        .iter()
        .map(|(name, tensor)| TensorInfo::of(name, tensor))
        .collect::<Result<_>>()
        .with_context(|| format!("cannot write {}", path.display()))?;
    let tensors: HashMap<&str, &Tensor> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    save_each(path, &infos, metadata, |name| Ok(tensors[name].shallow_clone()))
}

/// As [`save`], of tensors that are made one by one: each is asked for by its name when its turn comes, written, and
/// dropped.
///
/// # Errors
/// Also where two have one name, or a tensor is not of the dtype and shape that was said of it.
pub fn save_each(
    path: &Path,
    infos: &[TensorInfo],
    metadata: &[(&str, &str)],
    tensor: impl FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    let mut header = HashMap::from([("format", "pt")]);
    header.extend(metadata.iter().copied());
    write_atomically(path, |file| {
        let mut file = std::io::BufWriter::with_capacity(1 << 20, file);
        serialize_into(&mut file, infos, &header, tensor)?;
        file.flush()?;
        Ok(())
    })
}

/// The safetensors format by hand: length of the header, header, data; streamed, so that nothing is held twice.
fn serialize_into(
    out: &mut impl Write,
    infos: &[TensorInfo],
    metadata: &HashMap<&str, &str>,
    mut tensor: impl FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    let mut infos: Vec<&TensorInfo> = infos.iter().collect();
    // As the reference writer sorts them: by alignment, the widest first, then by name.
    infos.sort_by(|a, b| {
        let width = |info: &TensorInfo| info.kind.elt_size_in_bytes();
        width(b).cmp(&width(a)).then(a.name.cmp(&b.name))
    });
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::to_value(metadata)?);
    let mut offset = 0;
    for info in &infos {
        let TensorInfo { name, kind, shape } = info;
        let dtype = dtype_of(*kind).with_context(|| format!("tensor `{name}`"))?;
        let end = offset + info.num_bytes();
        let value = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [offset, end]});
        ensure!(header.insert(name.clone(), value).is_none(), "two tensors are named `{name}`");
        offset = end;
    }
    let mut header = serde_json::to_vec(&header)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for info in infos {
        let tensor = tensor(&info.name)?;
        let found = TensorInfo::of(&info.name, &tensor)?;
        ensure!(
            found == *info,
            "tensor `{}` was to be {:?} {:?}, it is {:?} {:?}",
            info.name,
            info.kind,
            info.shape,
            found.kind,
            found.shape
        );
        out.write_all(bytes_of(&tensor.detach().to_device(Device::Cpu).contiguous()))?;
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use ::safetensors::SafeTensors;

    use super::*;

    pub(in crate::checkpoint) fn example() -> Vec<(String, Tensor)> {
        vec![
            ("b.weight".into(), Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]).view([2, 3])),
            ("a.ids".into(), Tensor::from_slice(&[7i64, 8])),
            ("c.half".into(), Tensor::from_slice(&[0.5f32, -1.5]).to_kind(Kind::BFloat16)),
            ("d.scalar".into(), Tensor::from(2.5f32)),
            ("e.empty".into(), Tensor::zeros([0, 4], (Kind::Float, Device::Cpu))),
        ]
    }

    #[test]
    fn tensors_are_asked_for_one_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let tensors: HashMap<String, Tensor> = example().into_iter().collect();
        let infos: Vec<TensorInfo> = example().iter().map(|(name, t)| TensorInfo::of(name, t).unwrap()).collect();
        let mut asked = Vec::new();
        save_each(&path, &infos, &[], |name| {
            asked.push(name.to_owned());
            Ok(tensors[name].shallow_clone())
        })
        .unwrap();
        assert_eq!(asked, ["a.ids", "b.weight", "d.scalar", "e.empty", "c.half"]); // the widest first
        let streamed = std::fs::read(&path).unwrap();
        save(&path, &example(), &[]).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), streamed);

        let other = |name: &str| save_each(&path, &infos, &[], |_| Ok(tensors[name].shallow_clone())).unwrap_err();
        let error = format!("{:#}", other("d.scalar"));
        assert!(error.contains("tensor `a.ids` was to be Int64 [2], it is Float []"), "{error}");
        let twice = [infos[0].clone(), infos[0].clone()];
        let error =
            format!("{:#}", save_each(&path, &twice, &[], |_| unreachable!("the header comes first")).unwrap_err());
        assert!(error.contains("two tensors are named `b.weight`"), "{error}");
        // Whatever failed left the file as it was, and nothing beside it.
        assert_eq!(std::fs::read(&path).unwrap(), streamed);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_reference_reader_accepts_our_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        save(&path, &example(), &[]).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let parsed = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(parsed.tensor("b.weight").unwrap().shape(), [2, 3]);
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    }
}
