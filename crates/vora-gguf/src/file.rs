//! The file itself: metadata, tensor list, and the tensors' values.
//!
//! The header is not trusted: nothing is allocated by a count or a length that it states, every range is checked
//! against the file, and tensors may not overlap.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

use crate::TensorKind;

/// A parsed file over the bytes `B` that it was read from: a `Vec<u8>`, a borrowed slice, a memory map.
#[derive(Debug)]
pub struct Gguf<B> {
    bytes: B,
    metadata: BTreeMap<String, Value>,
    tensors: BTreeMap<String, TensorInfo>,
}

/// One metadata value; an array stays undecoded until it is asked for.
#[derive(Debug, Clone)]
enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f32),
    Double(f64),
    Bool(bool),
    Text(String),
    Array { kind: u32, len: u64, range: Range<usize> },
}

/// Shape, kind and place of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    shape: Vec<usize>, // the file has it the other way round
    kind: TensorKind,
    range: Range<usize>, // in the file
}

impl TensorInfo {
    /// Slowest dimension first, as in PyTorch; no dimension is 0.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How the values are stored.
    pub fn kind(&self) -> TensorKind {
        self.kind
    }

    /// The bytes of the file that hold it.
    pub fn range(&self) -> Range<usize> {
        self.range.clone()
    }
}

impl<B: AsRef<[u8]>> Gguf<B> {
    /// Reads and checks everything but the tensors' values.
    ///
    /// # Errors
    /// Names the key or tensor, and what is wrong with it: an unknown kind, a range outside the file, an overlap, a
    /// name that stands there twice, a shape whose size overflows.
    pub fn parse(bytes: B) -> Result<Self> {
        let all = bytes.as_ref();
        ensure!(all.starts_with(b"GGUF"), "this is not a GGUF file: its first four bytes are not `GGUF`");
        let mut reader = Reader { bytes: all, at: 4 };
        let version = reader.u32()?;
        ensure!(version == 2 || version == 3, "GGUF version {version} is not read here, only 2 and 3");
        let (num_tensors, num_values) = (reader.u64()?, reader.u64()?);

        let mut metadata = BTreeMap::new();
        for idx in 0..num_values {
            let read = |reader: &mut Reader<'_>| -> Result<_> {
                let (key, kind) = (reader.text()?.to_owned(), reader.u32()?);
                let value = reader.value(kind).with_context(|| format!("key `{key}`"))?;
                Ok((key, value))
            };
            let (key, value) = read(&mut reader).with_context(|| format!("metadata {idx} of {num_values}"))?;
            ensure!(!metadata.contains_key(&key), "metadata key `{key}` stands there twice");
            metadata.insert(key, value);
        }

        let mut tensors = BTreeMap::new();
        for idx in 0..num_tensors {
            let read = |reader: &mut Reader<'_>| -> Result<_> {
                let name = reader.text()?.to_owned();
                let info = reader.tensor_info().with_context(|| format!("tensor `{name}`"))?;
                Ok((name, info))
            };
            let (name, info) = read(&mut reader).with_context(|| format!("tensor {idx} of {num_tensors}"))?;
            ensure!(!tensors.contains_key(&name), "tensor `{name}` stands there twice");
            tensors.insert(name, info);
        }

        let (header, len) = (reader.at, all.len());
        let mut file = Self { bytes, metadata, tensors };
        let alignment = match file.has("general.alignment") {
            true => usize::try_from(file.unsigned("general.alignment")?)?,
            false => 32,
        };
        ensure!(alignment.is_power_of_two(), "general.alignment is {alignment}, it must be a power of two");
        let data_at = header.checked_next_multiple_of(alignment).filter(|&at| at <= len);
        match data_at {
            Some(at) => file.place_tensors(at, len, alignment)?,
            None => ensure!(file.tensors.is_empty(), "the file ends before its tensors begin"),
        }
        Ok(file)
    }

    /// Checks the tensors' ranges, which the header counts from `data_at` on, and counts them from the file's start.
    fn place_tensors(&mut self, data_at: usize, len: usize, alignment: usize) -> Result<()> {
        let mut by_place: Vec<_> = self.tensors.iter_mut().collect();
        by_place.sort_by_key(|(_, info)| (info.range.start, info.range.end));
        let (mut free, data_len) = (0, len - data_at);
        for (name, TensorInfo { range, .. }) in by_place {
            ensure!(range.start % alignment == 0, "tensor `{name}` begins off the alignment of {alignment}");
            ensure!(range.start >= free, "tensor `{name}` overlaps another");
            let end = range.end;
            ensure!(
                end <= data_len,
                "tensor `{name}` ends at byte {end} of the data, the file has {data_len}: is it cut off?"
            );
            free = end;
            *range = data_at + range.start..data_at + end;
        }
        Ok(())
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// What the header says of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// All values of a tensor, dequantised.
    ///
    /// # Errors
    /// Where there is no such tensor.
    pub fn tensor(&self, name: &str) -> Result<Vec<f32>> {
        let info = self.tensors.get(name).with_context(|| format!("there is no tensor `{name}`"))?;
        let mut out = Vec::new();
        info.kind.dequantise(self.raw(info), &mut out);
        Ok(out)
    }

    /// The stored bytes of a tensor.
    pub(crate) fn raw(&self, info: &TensorInfo) -> &[u8] {
        &self.bytes.as_ref()[info.range()]
    }

    /// Whether the metadata has this key.
    pub fn has(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    /// A string.
    ///
    /// # Errors
    /// This and the other readers of metadata name a key that is missing or of another type.
    pub fn text(&self, key: &str) -> Result<&str> {
        match self.value(key)? {
            Value::Text(text) => Ok(text),
            other => bail!("metadata `{key}` is {other:?}, it must be a string"),
        }
    }

    /// An integer that is not negative.
    ///
    /// # Errors
    /// As [`Gguf::text`].
    pub fn unsigned(&self, key: &str) -> Result<u64> {
        match self.value(key)? {
            Value::Unsigned(value) => Ok(*value),
            Value::Signed(value) if *value >= 0 => Ok(value.unsigned_abs()),
            other => bail!("metadata `{key}` is {other:?}, it must be a number from 0"),
        }
    }

    /// A float as the shortest decimal that names it: 1e-5 stored in f32 is 1e-5, and not 9.999999747e-6.
    ///
    /// # Errors
    /// As [`Gguf::text`].
    pub fn float(&self, key: &str) -> Result<f64> {
        match self.value(key)? {
            Value::Float(value) => shortest(*value),
            Value::Double(value) => Ok(*value),
            other => bail!("metadata `{key}` is {other:?}, it must be a float"),
        }
    }

    /// True or false.
    ///
    /// # Errors
    /// As [`Gguf::text`].
    pub fn bool(&self, key: &str) -> Result<bool> {
        match self.value(key)? {
            Value::Bool(value) => Ok(*value),
            other => bail!("metadata `{key}` is {other:?}, it must be true or false"),
        }
    }

    /// An array of strings.
    ///
    /// # Errors
    /// As [`Gguf::text`].
    pub fn texts(&self, key: &str) -> Result<Vec<&str>> {
        let (len, mut reader) = self.array(key, 8)?;
        (0..len).map(|_| reader.text()).collect()
    }

    /// An array of 32-bit signed integers.
    ///
    /// # Errors
    /// As [`Gguf::text`].
    pub fn integers(&self, key: &str) -> Result<Vec<i32>> {
        let (len, mut reader) = self.array(key, 5)?;
        (0..len).map(|_| Ok(reader.u32()?.cast_signed())).collect()
    }

    /// An array of 32-bit floats.
    ///
    /// # Errors
    /// As [`Gguf::text`].
    pub fn floats(&self, key: &str) -> Result<Vec<f32>> {
        let (len, mut reader) = self.array(key, 6)?;
        (0..len).map(|_| Ok(f32::from_bits(reader.u32()?))).collect()
    }

    fn value(&self, key: &str) -> Result<&Value> {
        self.metadata.get(key).with_context(|| format!("there is no metadata `{key}`"))
    }

    fn array(&self, key: &str, expected: u32) -> Result<(u64, Reader<'_>)> {
        match self.value(key)? {
            Value::Array { kind, len, range } if *kind == expected => {
                Ok((*len, Reader { bytes: &self.bytes.as_ref()[range.clone()], at: 0 }))
            }
            Value::Array { kind, .. } => bail!("metadata `{key}` is an array of kind {kind}, it must be {expected}"),
            _ => bail!("metadata `{key}` must be an array"),
        }
    }
}

/// The shortest decimal that reads back as `value`, which is what a person wrote.
pub(crate) fn shortest(value: f32) -> Result<f64> {
    Ok(value.to_string().parse()?)
}

#[derive(Debug)]
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let left = self.bytes.len() - self.at;
        ensure!(len <= left, "{len} bytes are needed at byte {}, {left} are left: is the file cut off?", self.at);
        let taken = &self.bytes[self.at..self.at + len];
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("take gives as many bytes as asked for"))
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<&'a str> {
        let len = usize::try_from(self.u64()?)?;
        std::str::from_utf8(self.take(len)?).context("a string is not UTF-8")
    }

    fn value(&mut self, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(self.u32()?.cast_signed().into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?)),
            7 => Value::Bool(self.array::<1>()? != [0]),
            8 => Value::Text(self.text()?.to_owned()),
            9 => {
                let (kind, len) = (self.u32()?, self.u64()?);
                let start = self.at;
                match scalar_bytes(kind) {
                    Some(size) => {
                        let bytes = usize::try_from(len)?.checked_mul(size).context("an array's length overflows")?;
                        self.take(bytes)?;
                    }
                    None if kind == 8 => {
                        for _ in 0..len {
                            self.text()?;
                        }
                    }
                    None => bail!("an array of kind {kind} is not read here"),
                }
                Value::Array { kind, len, range: start..self.at }
            }
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(self.u64()?.cast_signed()),
            12 => Value::Double(f64::from_le_bytes(self.array()?)),
            _ => bail!("value of unknown kind {kind}"),
        })
    }

    /// Its range counts from the beginning of the data.
    fn tensor_info(&mut self) -> Result<TensorInfo> {
        let num_dims = self.u32()?;
        ensure!(num_dims <= 4, "it has {num_dims} dimensions, at most 4 are allowed");
        let mut shape = Vec::new();
        for _ in 0..num_dims {
            shape.push(usize::try_from(self.u64()?)?);
        }
        let kind = TensorKind::from_id(self.u32()?)?;
        let (block_len, block_bytes) = kind.block();
        let row = shape.first().copied().unwrap_or(1);
        ensure!(row % block_len == 0, "its rows of {row} do not divide into blocks of {block_len}");
        let start = usize::try_from(self.u64()?)?;
        let end = shape
            .iter()
            .try_fold(1usize, |count, &dim| count.checked_mul(dim))
            .and_then(|count| (count / block_len).checked_mul(block_bytes))
            .and_then(|bytes| start.checked_add(bytes))
            .with_context(|| format!("its shape {shape:?} overflows"))?;
        ensure!(!shape.contains(&0), "its shape {shape:?} has a 0");
        shape.reverse();
        Ok(TensorInfo { shape, kind, range: start..end })
    }
}

/// Size of one number of an array, none for what is not a number.
fn scalar_bytes(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    const FILE: &[u8] = include_bytes!("../../../fixtures/golden/gguf_file.gguf");
    const GOLDEN: &[u8] = include_bytes!("../../../fixtures/golden/gguf_file.safetensors");
    const KINDS: &[u8] = include_bytes!("../../../fixtures/golden/gguf_kinds.gguf");
    const KINDS_GOLDEN: &[u8] = include_bytes!("../../../fixtures/golden/gguf_kinds.safetensors");

    #[test]
    fn every_kind_matches_the_python_package_bit_for_bit() {
        let mut kinds = Vec::new();
        for (file, golden) in [(FILE, GOLDEN), (KINDS, KINDS_GOLDEN)] {
            let (file, golden) = (Gguf::parse(file).unwrap(), SafeTensors::deserialize(golden).unwrap());
            for name in file.names() {
                let (info, values) = (file.info(name).unwrap(), file.tensor(name).unwrap());
                let expected = golden.tensor(&format!("raw.{name}")).unwrap();
                assert_eq!(info.shape(), expected.shape(), "{name}");
                let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                assert!(bytes == expected.data(), "{name} of kind {}", info.kind());
                kinds.push(info.kind().to_string());
            }
        }
        kinds.sort();
        kinds.dedup();
        let all = ["BF16", "F16", "F32", "Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"];
        assert_eq!(kinds, all);
    }

    #[test]
    fn metadata_of_every_kind_is_read() {
        let file = Gguf::parse(FILE).unwrap();
        for bits in [8, 16, 32, 64] {
            assert_eq!(file.unsigned(&format!("test.uint{bits}")).unwrap(), u64::MAX >> (64 - bits));
            let text = file.unsigned(&format!("test.int{bits}")).unwrap_err().to_string();
            assert!(text.contains(&format!("Signed({})", i64::MIN >> (64 - bits))), "{text}");
        }
        assert_eq!((file.float("test.float32").unwrap(), file.float("test.float64").unwrap()), (0.1, 0.1));
        assert!(file.bool("test.bool").unwrap());
        assert_eq!(file.text("tokenizer.ggml.pre").unwrap(), "smollm");
        assert_eq!(file.texts("tokenizer.ggml.merges").unwrap()[3], "hell o");
        assert_eq!(file.integers("tokenizer.ggml.token_type").unwrap()[..4], [3, 3, 3, 1]);
        for (error, part) in [
            (file.text("nope").unwrap_err(), "no metadata `nope`"),
            (file.texts("test.floats").unwrap_err(), "`test.floats` is an array of kind 6, it must be 8"),
            (file.text("test.bool").unwrap_err(), "`test.bool` is Bool(true), it must be a string"),
        ] {
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn a_cut_file_is_an_error_wherever_it_is_cut() {
        let file = Gguf::parse(FILE).unwrap();
        let end = file.tensors.values().map(|info| info.range.end).max().unwrap();
        for len in 0..end {
            assert!(Gguf::parse(&FILE[..len]).is_err(), "cut at {len}");
        }
    }

    #[test]
    fn no_altered_byte_makes_it_panic() {
        for original in [FILE, KINDS] {
            let header = Gguf::parse(original).unwrap().tensors.values().map(|info| info.range.start).min().unwrap();
            let mut bytes = original.to_vec();
            for at in 0..header {
                for value in [0, 1, 9, 0x7f, 0xff, original[at] ^ 1] {
                    bytes[at] = value;
                    if let Ok(file) = Gguf::parse(&bytes) {
                        file.names().for_each(|name| drop(file.tensor(name)));
                    }
                }
                bytes[at] = original[at];
            }
        }
    }

    /// A version 3 file: metadata and tensor list as given, then 64 bytes of data.
    fn build(num_tensors: u64, num_values: u64, body: &[&[u8]]) -> Vec<u8> {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(num_tensors.to_le_bytes());
        bytes.extend(num_values.to_le_bytes());
        bytes.extend(body.concat());
        bytes.resize(bytes.len().next_multiple_of(32) + 64, 0);
        bytes
    }

    fn text(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let dims_bytes: Vec<u8> = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect();
        let num_dims = (dims.len() as u32).to_le_bytes();
        [&text(name)[..], &num_dims, &dims_bytes, &kind.to_le_bytes(), &offset.to_le_bytes()].concat()
    }

    #[test]
    fn hostile_headers_are_refused() {
        let huge = u64::MAX.to_le_bytes();
        let string = 8u32.to_le_bytes();
        let array = |kind: u32| [9u32.to_le_bytes(), kind.to_le_bytes()].concat();
        let t = tensor;
        for (bytes, part) in [
            (b"PK\x03\x04 a wheel".to_vec(), "not a GGUF file"),
            (b"GGUF\x01\0\0\0".to_vec(), "version 1"),
            (build(0, u64::MAX, &[]), "metadata key `` stands there twice"),
            (build(u64::MAX, 0, &[&t("a", &[1], 0, 0)]), "tensor `` stands there twice"),
            (build(0, 1, &[&huge]), "bytes are needed at byte"),
            (build(0, 1, &[&text("k"), &string, &(1u64 << 30).to_le_bytes()]), "1073741824 bytes are needed"),
            (build(0, 1, &[&text("k"), &string, &huge]), "key `k`"),
            (build(0, 1, &[&text("k"), &array(8), &huge]), "key `k`"),
            (build(0, 1, &[&text("k"), &array(12), &huge]), "overflows"),
            (build(0, 1, &[&text("k"), &array(9), &huge]), "array of kind 9"),
            (build(0, 1, &[&text("k"), &77u32.to_le_bytes()]), "unknown kind 77"),
            (build(0, 2, &[&text("k"), &array(0), &[0; 8], &text("k"), &array(0), &[0; 8]]), "`k` stands there twice"),
            (build(1, 0, &[&t("a", &[1 << 33, 1 << 33], 0, 0)]), "overflows"),
            (build(1, 0, &[&t("a", &[1 << 62], 0, 0)]), "overflows"),
            (build(1, 0, &[&t("a", &[0, 1 << 62, 1 << 62], 0, 0)]), "has a 0"),
            (build(1, 0, &[&t("a", &[8], 0, u64::MAX - 31)]), "overflows"),
            (build(1, 0, &[&t("a", &[1; 5], 0, 0)]), "5 dimensions"),
            (build(1, 0, &[&t("a", &[4], 10, 0)]), "tensor `a`: kind 10 is not read here, only F32, F16, Q4_0"),
            (build(1, 0, &[&t("a", &[33], 3, 0)]), "rows of 33 do not divide into blocks of 32"),
            (build(1, 0, &[&t("a", &[128], 14, 0)]), "rows of 128 do not divide into blocks of 256"),
            (build(1, 0, &[&t("a", &[17], 0, 0)]), "`a` ends at byte 68 of the data, the file has 64"),
            (build(1, 0, &[&t("a", &[4], 0, 4)]), "off the alignment of 32"),
            (build(2, 0, &[&t("a", &[9], 0, 0), &t("b", &[8], 0, 32)]), "`b` overlaps another"),
            (build(2, 0, &[&t("a", &[8], 0, 0), &t("a", &[8], 0, 32)]), "`a` stands there twice"),
        ] {
            let error = format!("{:#}", Gguf::parse(&bytes).unwrap_err());
            assert!(error.contains(part), "{error} has no `{part}`");
        }
    }
}
