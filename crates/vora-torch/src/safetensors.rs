//! Reading checkpoint files as views of mapped memory, and writing them so that a crash leaves no half file.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::c_void;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use memmap2::MmapMut;
use safetensors::{Dtype, SafeTensors};
use serde::Deserializer;
use serde::de::{Error, IgnoredAny, MapAccess, Visitor};
use tch::{Device, Kind, Tensor};
use vora_files::{tell_once, write_atomically};
use vora_gguf::Llm;

use crate::{error, ffi, gguf};

/// The largest JSON that says where tensors lie: no honest one comes near it.
const MAX_HEADER: usize = 100_000_000;

/// Where a tensor lies: a file of the checkpoint, and there its bytes, or none where it has to be dequantised.
#[derive(Debug, Clone)]
struct Entry {
    file_idx: usize,
    range: Option<Range<usize>>,
    kind: Kind,
    shape: Vec<i64>,
}

/// One mapped file, and what a GGUF file has in it.
#[derive(Debug)]
struct Mapped {
    path: PathBuf,
    map: Arc<MmapMut>,
    gguf: Option<Llm<gguf::Mapped>>,
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
    /// Errors name the file and what is wrong with it; pickle files are refused by name.
    pub fn open(path: &Path) -> Result<Self> {
        let mut checkpoint = Self { path: path.to_owned(), files: Vec::new(), entries: BTreeMap::new() };
        for file in checkpoint_files(path)? {
            checkpoint.add(&file)?;
        }
        Ok(checkpoint)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let map = gguf::map(path)?;
        let in_file = || format!("reading {}", path.display());
        let is_gguf = map.starts_with(b"GGUF") || path.extension().is_some_and(|extension| extension == "gguf");
        let gguf = is_gguf.then(|| gguf::open(&map)).transpose().with_context(in_file)?;
        let entries = match &gguf {
            Some(model) => gguf_entries(model).with_context(in_file)?,
            None => entries(&map).with_context(|| format!("{} is not a whole safetensors file", path.display()))?,
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

    /// Kind and shape of a tensor.
    pub fn info(&self, name: &str) -> Option<(Kind, &[i64])> {
        self.entries.get(name).map(|e| (e.kind, e.shape.as_slice()))
    }

    /// The tensor as it lies in the file: on the CPU, a view of the mapped memory.
    ///
    /// What a GGUF file has in blocks of few bits, or its rows in another order, is a new tensor.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let entry = self.entry(name)?;
        match &entry.range {
            Some(range) => view(&self.files[entry.file_idx].map, range.clone(), entry),
            None => self.dequantise(name, entry, entry.kind),
        }
    }

    /// As [`Checkpoint::tensor`], in `kind`; what has to be dequantised takes no way round by f32.
    pub fn tensor_as(&self, name: &str, kind: Kind) -> Result<Tensor> {
        let entry = self.entry(name)?;
        match entry.range {
            Some(_) => Ok(self.tensor(name)?.to_kind(kind)),
            None => self.dequantise(name, entry, kind),
        }
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).with_context(|| format!("{} has no tensor `{name}`", self.path.display()))
    }

    fn dequantise(&self, name: &str, entry: &Entry, kind: Kind) -> Result<Tensor> {
        let model = self.files[entry.file_idx].gguf.as_ref().expect("only a GGUF file has tensors without a range");
        gguf::dequantise(model, name, &entry.shape, kind)
    }
}

/// A tensor over the bytes of a map, which lives as long as it does.
fn view(map: &Arc<MmapMut>, range: Range<usize>, entry: &Entry) -> Result<Tensor> {
    let bytes = &map[range];
    if bytes.is_empty() || !(bytes.as_ptr() as usize).is_multiple_of(entry.kind.elt_size_in_bytes()) {
        // Nothing to view, or a file whose header is not padded: copied.
        return Tensor::f_from_data_size(bytes, &entry.shape, entry.kind).map_err(error::clean);
    }
    let owner = Arc::into_raw(Arc::clone(map)).cast_mut().cast::<c_void>();
    // SAFETY: the range lies inside the map, is aligned for its kind, and the map lives until `release`.
    let tensor = ffi::tensor(unsafe {
        ffi::vora_from_blob(
            bytes.as_ptr().cast_mut().cast(),
            entry.shape.as_ptr(),
            entry.shape.len(),
            scalar_type(entry.kind),
            owner,
            release,
        )
    });
    if tensor.is_err() {
        release(owner);
    }
    tensor
}

/// Drops the reference that a view held on its map.
extern "C" fn release(owner: *mut c_void) {
    // SAFETY: `owner` came from `Arc::into_raw` of this type, once per view.
    drop(unsafe { Arc::from_raw(owner.cast_const().cast::<MmapMut>()) });
}

/// What a safetensors file says of its tensors, each range checked against the file.
fn entries(map: &[u8]) -> Result<Vec<(String, Entry)>> {
    let (header_len, metadata) = SafeTensors::read_metadata(map).map_err(|e| anyhow!("{e}"))?;
    let data_start = header_len + size_of::<u64>();
    // The reader lets the later one of two equal names win; who wrote them meant one of them to be overlooked.
    let unique = serde_json::Deserializer::from_slice(&map[size_of::<u64>()..data_start]).deserialize_map(UniqueNames);
    unique.map_err(|e| anyhow!("{e}"))?;
    metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let in_tensor = || format!("tensor `{name}`");
            let kind = kind_of(info.dtype).with_context(in_tensor)?;
            let shape = dims(&info.shape).with_context(in_tensor)?;
            let (start, end) = info.data_offsets;
            Ok((name, Entry { file_idx: 0, range: Some(data_start + start..data_start + end), kind, shape }))
        })
        .collect()
}

/// The tensors of a GGUF file under HF's names.
fn gguf_entries(model: &Llm<gguf::Mapped>) -> Result<Vec<(String, Entry)>> {
    let entry = |name: &str| {
        let info = model.info(name).expect("a name of this file");
        let shape = dims(info.shape()).with_context(|| format!("tensor `{name}`"))?;
        Ok((name.to_owned(), Entry { file_idx: 0, range: model.plain(name), kind: gguf::kind_of(info.kind()), shape }))
    };
    model.names().map(entry).collect()
}

/// A shape as libtorch has it: it computes strides even where a dimension is 0.
fn dims(shape: &[usize]) -> Result<Vec<i64>> {
    let dims: Option<Vec<i64>> = shape.iter().map(|&dim| i64::try_from(dim).ok()).collect();
    let dims = dims.filter(|dims| dims.iter().try_fold(1i64, |size, &dim| size.checked_mul(dim.max(1))).is_some());
    dims.with_context(|| format!("its shape {shape:?} overflows"))
}

/// Reads a JSON object for its keys alone: two equal ones are an error.
struct UniqueNames;

impl<'de> Visitor<'de> for UniqueNames {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = HashSet::new();
        while let Some((name, IgnoredAny)) = map.next_entry::<String, IgnoredAny>()? {
            if seen.contains(&name) {
                return Err(A::Error::custom(format_args!("two tensors are named `{name}`")));
            }
            seen.insert(name);
        }
        Ok(())
    }
}

/// Refuses a file that only Python's unpickler reads.
fn refuse_pickle(path: &Path) -> Result<()> {
    ensure!(
        !is_pickle(path),
        "{} is a pickle file, which can run code when it is read: convert it to safetensors first",
        path.display()
    );
    Ok(())
}

fn is_pickle(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| ["bin", "pt", "pth", "ckpt", "pkl"].iter().any(|known| extension == *known))
}

/// The files that make up the checkpoint at `path`.
fn checkpoint_files(path: &Path) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        refuse_pickle(path)?;
        return Ok(vec![path.to_owned()]);
    }
    let (single, index) = (path.join("model.safetensors"), path.join("model.safetensors.index.json"));
    if single.exists() {
        // What an earlier save in shards leaves: HF's `save_pretrained` removes the shards and keeps the index.
        if index.exists() {
            tell_once(format!(
                "{} has model.safetensors and model.safetensors.index.json: the single file is read, as transformers \
                 reads it; remove the one that is not meant",
                path.display()
            ));
        }
        return Ok(vec![single]);
    }
    if index.exists() {
        return shards(path, &index);
    }
    let adapter = path.join("adapter_model.safetensors");
    if adapter.exists() {
        return Ok(vec![adapter]);
    }
    if let Some(file) = vora_gguf::folder::find(path)? {
        return Ok(vec![file]);
    }
    let files = std::fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?;
    let mut pickles: Vec<_> = files.flatten().filter(|file| is_pickle(&file.path())).map(|f| f.file_name()).collect();
    pickles.sort();
    if let Some(name) = pickles.first() {
        bail!("{} holds only pickled weights ({}): convert them to safetensors first", path.display(), name.display());
    }
    bail!("{} has neither model.safetensors nor model.safetensors.index.json nor a .gguf file", path.display())
}

/// The files of `folder` that an index names.
fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let cannot = || format!("cannot read {}", index.display());
    let len = std::fs::metadata(index).with_context(cannot)?.len();
    ensure!(len <= MAX_HEADER as u64, "{} has {len} bytes, at most {MAX_HEADER} are read", index.display());
    let text = std::fs::read(index).with_context(cannot)?;
    let json: serde_json::Value =
        serde_json::from_slice(&text).with_context(|| format!("{} is not JSON", index.display()))?;
    let map =
        json["weight_map"].as_object().with_context(|| format!("{} has no object `weight_map`", index.display()))?;
    let mut names = Vec::new();
    for (tensor, file) in map {
        let file = file
            .as_str()
            .filter(|f| !f.contains(['/', '\\']))
            .with_context(|| format!("{}: tensor `{tensor}` names no file of this folder: {file}", index.display()))?;
        names.push(folder.join(file));
    }
    names.sort();
    names.dedup();
    names.iter().try_for_each(|file| refuse_pickle(file))?;
    Ok(names)
}

/// libtorch's kind for a safetensors dtype.
fn kind_of(dtype: Dtype) -> Result<Kind> {
    Ok(match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::I8 => Kind::Int8,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        other => bail!("dtype {other:?} is not supported"),
    })
}

/// `c10::ScalarType` of a kind that a checkpoint can hold, by its number in libtorch's ABI.
fn scalar_type(kind: Kind) -> i8 {
    match kind {
        Kind::Uint8 => 0,
        Kind::Int8 => 1,
        Kind::Int16 => 2,
        Kind::Int => 3,
        Kind::Int64 => 4,
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::Bool => 11,
        Kind::BFloat16 => 15,
        other => unreachable!("kind_of gives no {other:?}"),
    }
}

/// The safetensors dtype for a kind.
fn dtype_of(kind: Kind) -> Result<Dtype> {
    Ok(match kind {
        Kind::Double => Dtype::F64,
        Kind::Float => Dtype::F32,
        Kind::Half => Dtype::F16,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Int64 => Dtype::I64,
        Kind::Int => Dtype::I32,
        Kind::Int16 => Dtype::I16,
        Kind::Int8 => Dtype::I8,
        Kind::Uint8 => Dtype::U8,
        Kind::Bool => Dtype::BOOL,
        other => bail!("safetensors has no dtype for {other:?}"),
    })
}

/// What the header of a file says of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Its name.
    pub name: String,
    /// The kind of its elements.
    pub kind: Kind,
    /// Its dimensions.
    pub shape: Vec<i64>,
}

impl Info {
    /// What is to be said of this tensor.
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
pub fn save(path: &Path, tensors: &[(String, Tensor)], metadata: &[(&str, &str)]) -> Result<()> {
    let infos: Vec<Info> = tensors
        .iter()
        .map(|(name, tensor)| Info::of(name, tensor))
        .collect::<Result<_>>()
        .with_context(|| format!("cannot write {}", path.display()))?;
    let tensors: HashMap<&str, &Tensor> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    save_each(path, &infos, metadata, |name| Ok(tensors[name].shallow_clone()))
}

/// As [`save`], of tensors that are made one by one: each is asked for by its name when its turn comes, written, and
/// dropped.
///
/// # Errors
/// Also where two have one name, or a tensor is not of the kind and shape that was said of it.
pub fn save_each(
    path: &Path,
    infos: &[Info],
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
    infos: &[Info],
    metadata: &HashMap<&str, &str>,
    mut tensor: impl FnMut(&str) -> Result<Tensor>,
) -> Result<()> {
    let mut infos: Vec<&Info> = infos.iter().collect();
    // As the reference writer sorts them: by alignment, the widest first, then by name.
    infos.sort_by(|a, b| {
        let width = |info: &Info| info.kind.elt_size_in_bytes();
        width(b).cmp(&width(a)).then(a.name.cmp(&b.name))
    });
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".into(), serde_json::to_value(metadata)?);
    let mut offset = 0;
    for info in &infos {
        let Info { name, kind, shape } = info;
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
        let found = Info::of(&info.name, &tensor)?;
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
mod tests {
    use super::*;

    fn example() -> Vec<(String, Tensor)> {
        vec![
            ("b.weight".into(), Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0, 5.0, 6.0]).view([2, 3])),
            ("a.ids".into(), Tensor::from_slice(&[7i64, 8])),
            ("c.half".into(), Tensor::from_slice(&[0.5f32, -1.5]).to_kind(Kind::BFloat16)),
            ("d.scalar".into(), Tensor::from(2.5f32)),
            ("e.empty".into(), Tensor::zeros([0, 4], (Kind::Float, Device::Cpu))),
        ]
    }

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
    fn tensors_are_asked_for_one_by_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let tensors: HashMap<String, Tensor> = example().into_iter().collect();
        let infos: Vec<Info> = example().iter().map(|(name, t)| Info::of(name, t).unwrap()).collect();
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
            (b"PK\x03\x04 a zip of pickles".to_vec(), "header too large"),
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
