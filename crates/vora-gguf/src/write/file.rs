//! The file itself: metadata in the order it was given, then the tensors, each at a multiple of 32 bytes.

use std::io::Write;

use anyhow::{Context, Result, ensure};

use crate::TensorKind;

/// The alignment of files that do not name another.
const ALIGNMENT: usize = 32;

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "as they are called in GGUF")]
pub enum MetadataValue {
    U32(u32),
    I32s(Vec<i32>),
    F32(f32),
    F32s(Vec<f32>),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
}

/// A file to write: its metadata and what its tensors are. Their bytes are asked for one by one.
#[derive(Debug, Default)]
pub struct Writer {
    metadata: Vec<(String, MetadataValue)>,
    tensors: Vec<(String, Vec<usize>, TensorKind)>,
}

impl Writer {
    /// Adds a value; `general.architecture` comes first, by convention.
    pub fn put(&mut self, key: impl Into<String>, value: MetadataValue) {
        self.metadata.push((key.into(), value));
    }

    /// Adds a tensor of this shape, slowest dimension first.
    ///
    /// # Errors
    /// Where its rows do not divide into the kind's blocks.
    pub fn add(&mut self, name: impl Into<String>, shape: &[usize], kind: TensorKind) -> Result<()> {
        let (name, block) = (name.into(), kind.block().0);
        let row = shape.last().copied().unwrap_or(1);
        ensure!(row % block == 0, "rows of {row} of `{name}` do not divide into blocks of {block}");
        self.tensors.push((name, shape.to_vec(), kind));
        Ok(())
    }

    /// The names of all tensors in the order in which they are written, and the bytes that each takes.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, usize)> {
        self.tensors.iter().map(|(name, shape, kind)| (name.as_str(), bytes(shape, *kind)))
    }

    /// Writes version 3 of the format; `tensor` gives a tensor's bytes.
    ///
    /// # Errors
    /// Where `tensor` does, gives other than so many bytes, or `out` cannot be written.
    pub fn write(&self, out: &mut impl Write, mut tensor: impl FnMut(&str) -> Result<Vec<u8>>) -> Result<()> {
        let mut header = b"GGUF".to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((self.tensors.len() as u64).to_le_bytes());
        header.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_text(&mut header, key);
            put_value(&mut header, value);
        }
        let mut place = 0u64;
        for (name, shape, kind) in &self.tensors {
            put_text(&mut header, name);
            header.extend(u32::try_from(shape.len())?.to_le_bytes());
            shape.iter().rev().for_each(|&dim| header.extend((dim as u64).to_le_bytes()));
            header.extend(kind.id().to_le_bytes());
            header.extend(place.to_le_bytes());
            place += bytes(shape, *kind).next_multiple_of(ALIGNMENT) as u64;
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
        out.write_all(&header)?;
        for (name, shape, kind) in &self.tensors {
            let mut data = tensor(name).with_context(|| format!("tensor `{name}`"))?;
            let expected = bytes(shape, *kind);
            ensure!(data.len() == expected, "tensor `{name}` came as {} bytes, expected {expected}", data.len());
            data.resize(expected.next_multiple_of(ALIGNMENT), 0);
            out.write_all(&data)?;
        }
        Ok(())
    }
}

/// How many bytes a tensor takes.
fn bytes(shape: &[usize], kind: TensorKind) -> usize {
    let (block, block_bytes) = kind.block();
    shape.iter().product::<usize>() / block * block_bytes
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// The kind of the value, then the value; of an array, that of its entries and their number stand between.
fn put_value(out: &mut Vec<u8>, value: &MetadataValue) {
    let kind = |out: &mut Vec<u8>, kind: u32| out.extend(kind.to_le_bytes());
    let array = |out: &mut Vec<u8>, of: u32, len: usize| {
        out.extend(9u32.to_le_bytes());
        out.extend(of.to_le_bytes());
        out.extend((len as u64).to_le_bytes());
    };
    match value {
        MetadataValue::U32(value) => {
            kind(out, 4);
            out.extend(value.to_le_bytes());
        }
        MetadataValue::F32(value) => {
            kind(out, 6);
            out.extend(value.to_le_bytes());
        }
        MetadataValue::Bool(value) => {
            kind(out, 7);
            out.push(u8::from(*value));
        }
        MetadataValue::Text(text) => {
            kind(out, 8);
            put_text(out, text);
        }
        MetadataValue::I32s(values) => {
            array(out, 5, values.len());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
        MetadataValue::F32s(values) => {
            array(out, 6, values.len());
            values.iter().for_each(|value| out.extend(value.to_le_bytes()));
        }
        MetadataValue::Texts(texts) => {
            array(out, 8, texts.len());
            texts.iter().for_each(|text| put_text(out, text));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gguf;

    #[test]
    fn what_is_written_is_read() {
        let mut writer = Writer::default();
        for (key, value) in [
            ("a", MetadataValue::U32(7)),
            ("b", MetadataValue::F32(1e-5)),
            ("c", MetadataValue::Bool(true)),
            ("d", MetadataValue::Text("ü".into())),
            ("e", MetadataValue::Texts(vec!["x".into(), String::new()])),
            ("f", MetadataValue::I32s(vec![3, -1])),
            ("g", MetadataValue::F32s(vec![0.5])),
        ] {
            writer.put(key, value);
        }
        writer.add("one", &[3], TensorKind::F32).unwrap();
        writer.add("two", &[2, 1], TensorKind::F16).unwrap();
        let error = writer.add("x", &[2, 31], TensorKind::Q8_0).unwrap_err().to_string();
        assert_eq!(error, "rows of 31 of `x` do not divide into blocks of 32");
        let tensor = |name: &str| Ok(if name == "one" { vec![0; 12] } else { vec![0, 60, 0, 188] });
        let mut bytes = Vec::new();
        writer.write(&mut bytes, tensor).unwrap();
        let file = Gguf::parse(bytes).unwrap();
        assert_eq!((file.unsigned("a").unwrap(), file.float("b").unwrap()), (7, 1e-5));
        assert_eq!((file.bool("c").unwrap(), file.text("d").unwrap()), (true, "ü"));
        assert_eq!((file.texts("e").unwrap(), file.integers("f").unwrap()), (vec!["x", ""], vec![3, -1]));
        assert!(file.has("g"));
        assert_eq!((file.tensor("one").unwrap(), file.tensor("two").unwrap()), (vec![0.0; 3], vec![1.0, -1.0]));
        assert_eq!(file.info("two").unwrap().shape(), [2, 1]);
        let error = writer.write(&mut Vec::new(), |_| Ok(vec![0; 12])).unwrap_err().to_string();
        assert_eq!(error, "tensor `two` came as 12 bytes, expected 4");
    }
}
