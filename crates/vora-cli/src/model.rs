//! The model that a command asks, and how it is opened.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind};
use vora_infer::Assistant;
use vora_lora::ActsOn;
use vora_torch::runtime;

/// Which model, on which device.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelArgs {
    /// The folder that `vora merge` wrote, a run's final/ or checkpoint, a language model's GGUF file, or a model's name in the
    /// hub's cache
    model: String,
    /// The tokens that adapters act on, where they are apart from the weights: all, with_image or image_tokens; else as
    /// the folder says
    #[arg(long, value_name = "TOKENS", value_parser = ActsOn::parse)]
    acts_on: Option<ActsOn>,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", env = "VORA_DEVICE")]
    device: String,
    /// auto, bf16, f32 or f16
    #[arg(long, default_value = "auto")]
    dtype: String,
    /// Adapters over the model's LLM, each by the name that it is asked by: PEFT's folder, or a run's final/, which sees with its
    /// own eyes
    #[arg(long, value_name = "NAME=FOLDER", num_args = 1.., value_parser = named_folder)]
    lora_modules: Vec<(String, String)>,
}

/// A name and a folder.
fn named_folder(text: &str) -> Result<(String, String)> {
    let parts = text.split_once('=').filter(|(name, folder)| !name.is_empty() && !folder.is_empty());
    let (name, folder) = parts.with_context(|| format!("`{text}` is not NAME=FOLDER, as cats=adapters/cats"))?;
    Ok((name.to_owned(), folder.to_owned()))
}

/// The dtype of a folder that is written from another one: `auto` is what that is stored in.
pub(crate) fn written_kind(dtype: &str, from: &Path) -> Result<Kind> {
    match dtype {
        "auto" => vora_model::stored_kind(from, &vora_hub::resolve),
        other => runtime::kind(other, Device::Cpu),
    }
}

/// An error where a model, or an adapter, lies in the folder that is to be written, which is given as `flag`.
pub(crate) fn ensure_vacant(flag: &str, out: &Path) -> Result<()> {
    let there = ["config.json", "adapter_config.json"].into_iter().any(|file| out.join(file).exists());
    ensure!(!there, "{} already holds a model; choose another {flag}", out.display());
    Ok(())
}

/// Whether both are one file or folder, however they are written.
pub(crate) fn same_place(a: &Path, b: &Path) -> bool {
    let whole =
        |path: &Path| path.canonicalize().or_else(|_| std::path::absolute(path)).unwrap_or_else(|_| path.to_owned());
    whole(a) == whole(b)
}

/// An error where what is to be written is one of the files that are read, or its folder is not there.
pub(crate) fn ensure_apart(out: &Path, read: &[&Path]) -> Result<()> {
    for file in read {
        ensure!(!same_place(out, file), "--out is {}, which is read: choose another file", file.display());
    }
    let folder = out.parent().filter(|folder| !folder.as_os_str().is_empty());
    ensure!(folder.is_none_or(Path::is_dir), "--out is {}, whose folder is not there", out.display());
    Ok(())
}

impl ModelArgs {
    /// Opens it, ready to answer.
    pub(crate) fn open(&self) -> Result<Assistant> {
        let device = runtime::device(&self.device)?;
        let kind = runtime::kind(&self.dtype, device)?;
        let folder = vora_hub::resolve(&self.model)?;
        let mut model = vora_model::open(&folder, device, kind, &vora_hub::resolve)?;
        if let Some(acts_on) = self.acts_on {
            model.set_acts_on(acts_on).context("--acts-on")?;
        }
        let mut assistant = Assistant::new(model, &folder)?;
        for (name, folder) in &self.lora_modules {
            let folder = vora_hub::resolve(folder).with_context(|| format!("the adapter `{name}`"))?;
            assistant.add_adapter(name, &folder, &vora_hub::resolve).context("--lora-modules")?;
        }
        Ok(assistant)
    }

    /// The last part of its name or path.
    pub(crate) fn short_name(&self) -> String {
        let name = self.model.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
        if matches!(name, "" | "." | "..") { "vora".to_owned() } else { name.to_owned() }
    }
}
