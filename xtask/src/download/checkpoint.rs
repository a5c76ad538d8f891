//! Writing the files of a checkpoint folder: `model.safetensors` and the JSON files beside it.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Write,
    path::Path,
};

use anyhow::{Context, Result, ensure};
use half::bf16;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::Value;

/// Tensors on their way into a `model.safetensors`.
#[derive(Debug, Default)]
pub(crate) struct Tensors(Vec<(String, Dtype, Vec<usize>, Vec<u8>)>);

impl Tensors {
    pub(crate) fn push_f32(&mut self, name: impl Into<String>, shape: Vec<usize>, values: &[f32]) {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.0.push((name.into(), Dtype::F32, shape, bytes));
    }

    /// Rounds to the nearest bf16, ties to even, as PyTorch does.
    pub(crate) fn push_bf16(&mut self, name: impl Into<String>, shape: Vec<usize>, values: &[f32]) {
        let bytes = values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
        self.0.push((name.into(), Dtype::BF16, shape, bytes));
    }

    /// Writes the file through to the disk; the same tensors always give the same bytes.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let mut views = Vec::new();
        for (name, dtype, shape, bytes) in &self.0 {
            let view = TensorView::new(*dtype, shape.clone(), bytes).with_context(|| format!("tensor `{name}`"))?;
            views.push((name.as_str(), view));
        }
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let bytes = safetensors::serialize(views, Some(metadata))?;
        let written = File::create(path).and_then(|mut file| {
            file.write_all(&bytes)?;
            file.sync_all()
        });
        written.with_context(|| format!("writing {}", path.display()))
    }
}

/// Writes `value` indented, with a line feed at the end.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    fs::write(path, format!("{value:#}\n")).with_context(|| format!("writing {}", path.display()))
}

/// Refuses a tensor of another shape than its place in the model has.
pub(crate) fn check_shape(name: &str, found: &[usize], expected: &[usize]) -> Result<()> {
    ensure!(found == expected, "tensor `{name}` is {found:?}, the model has {expected:?}");
    Ok(())
}
