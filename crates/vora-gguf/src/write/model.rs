//! The tensors of a model in a file: under which names, as which kinds, in which order of rows.

use std::io::Write;

use anyhow::{Context, Result};

use super::file::Writer;
use super::quantise::{FileKind, quantise};
use crate::TensorKind;
use crate::llm::stored_row;

/// A model to write, by HF's names.
#[derive(Debug)]
pub struct ModelWriter {
    pub(super) writer: Writer,
    pub(super) kind: FileKind,
    tensors: Vec<Tensor>,
}

/// A tensor of the file.
#[derive(Debug)]
struct Tensor {
    name: String,
    hf_name: String,
    kind: TensorKind,
    heads: Option<usize>, // whose rows are reordered
    width: usize,         // of a row
    values: Vec<f32>,     // where they are known already
}

impl ModelWriter {
    /// One without tensors yet, whose matrices will be stored as `kind`.
    pub(super) fn new(kind: FileKind) -> Self {
        Self { writer: Writer::default(), kind, tensors: Vec::new() }
    }

    /// Adds the tensor `hf_name` as `name`; of its rows each of the `heads` has its halves side by side.
    pub(super) fn add(
        &mut self,
        name: String,
        hf_name: &str,
        shape: &[usize],
        kind: TensorKind,
        heads: Option<usize>,
    ) -> Result<()> {
        self.writer.add(name.clone(), shape, kind)?;
        let width = shape.get(1).copied().unwrap_or(1);
        self.tensors.push(Tensor { name, hf_name: hf_name.to_owned(), kind, heads, width, values: Vec::new() });
        Ok(())
    }

    /// Adds a vector of these values, which HF has no tensor for.
    pub(super) fn add_values(&mut self, name: &str, values: &[f32]) -> Result<()> {
        let (kind, width) = (TensorKind::F32, values.len());
        self.writer.add(name, &[width], kind)?;
        let (name, hf_name, values) = (name.to_owned(), String::new(), values.to_vec());
        self.tensors.push(Tensor { name, hf_name, kind, heads: None, width, values });
        Ok(())
    }

    /// How many bytes the tensors take, and how many they are.
    pub fn size(&self) -> (usize, usize) {
        self.writer.tensors().fold((0, 0), |(bytes, count), (_, more)| (bytes + more, count + 1))
    }

    /// What the tensor of that HF name is stored as.
    pub fn kind(&self, hf_name: &str) -> Option<TensorKind> {
        self.tensors.iter().find(|tensor| tensor.hf_name == hf_name).map(|tensor| tensor.kind)
    }

    /// The name in the file of the tensor of that HF name.
    pub fn name(&self, hf_name: &str) -> Option<&str> {
        self.tensors.iter().find(|tensor| tensor.hf_name == hf_name).map(|tensor| tensor.name.as_str())
    }

    /// Writes the file; `read` gives the values of a tensor by its HF name, row by row. One tensor is in memory at a time.
    ///
    /// # Errors
    /// Where `read` does, a number cannot be stored, or `out` cannot be written.
    pub fn write(&self, out: &mut impl Write, mut read: impl FnMut(&str) -> Result<Vec<f32>>) -> Result<()> {
        self.writer.write(out, |name| {
            let tensor = self.tensors.iter().find(|tensor| tensor.name == name).context("a tensor that was added")?;
            let values = if tensor.values.is_empty() { read(&tensor.hf_name)? } else { tensor.values.clone() };
            let values = match tensor.heads {
                None => values,
                Some(heads) => reordered(&values, tensor.width, heads),
            };
            let mut bytes = Vec::new();
            quantise(tensor.kind, &values, &mut bytes)?;
            Ok(bytes)
        })
    }
}

/// The rows of q or k in llama.cpp's order.
fn reordered(values: &[f32], width: usize, heads: usize) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    let rows = values.len() / width;
    for (row, values) in values.chunks_exact(width).enumerate() {
        out[stored_row(row, rows / heads) * width..][..width].copy_from_slice(values);
    }
    out
}
