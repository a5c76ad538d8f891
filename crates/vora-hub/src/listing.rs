//! What a model on the hub consists of, and which of its files loading it needs.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// The hexadecimal digits of a commit.
pub(crate) const COMMIT_LEN: usize = 40;

/// The files of a model at one revision that loading it needs.
#[derive(Debug)]
pub struct Listing {
    pub(crate) name: String,
    pub(crate) revision: String, // as it was asked for: a branch, a tag or a commit
    pub(crate) commit: String,
    pub(crate) files: Vec<String>,
}

impl Listing {
    /// Reads what `url` answered about the model `name` at `revision`.
    pub(crate) fn parse(name: &str, revision: &str, url: &str, text: &str) -> Result<Self> {
        let listing: Value = serde_json::from_str(text).with_context(|| format!("{url} gave no JSON"))?;
        let commit = listing["sha"].as_str().unwrap_or_default();
        ensure!(is_hex(commit, COMMIT_LEN), "{url} gave no commit");
        let files = listing["siblings"].as_array().with_context(|| format!("{url} gave no list of files"))?;
        let files: Vec<_> = files.iter().filter_map(|file| file["rfilename"].as_str()).collect();
        Ok(Self { name: name.into(), revision: revision.into(), commit: commit.into(), files: wanted(name, &files)? })
    }
}

/// Of a model's files those that loading needs: safetensors, JSON, tokenizer and chat template.
fn wanted(name: &str, files: &[&str]) -> Result<Vec<String>> {
    let top_level =
        || files.iter().copied().filter(|file| !file.contains(['/', '\\', '?', '#', '%']) && !file.starts_with('.'));
    let is_model = |file: &str| file.starts_with("model") && file.ends_with(".safetensors");
    let has_model = top_level().any(is_model);
    let wants = |file: &&str| match file.rsplit_once('.') {
        Some((_, "safetensors")) => !has_model || is_model(file), // not a second copy under another name
        Some((_, "json" | "jinja")) => true,
        _ => ["tokenizer.model", "merges.txt", "vocab.txt"].contains(file),
    };
    let wanted: Vec<_> = top_level().filter(wants).map(str::to_owned).collect();
    if !wanted.iter().any(|file| file.ends_with(".safetensors")) {
        let is_pickle = |file: &&str| [".bin", ".pt", ".pth", ".ckpt"].iter().any(|ending| file.ends_with(ending));
        match top_level().find(is_pickle) {
            Some(pickle) => bail!(
                "{name} has its weights as pickle only ({pickle}); reading a pickle runs whatever code it carries, so it is \
                 refused: look for a version of the model in safetensors, or convert it where you trust it"
            ),
            None => bail!("{name} has no safetensors file"),
        }
    }
    Ok(wanted)
}

/// Whether a text is a hash of so many digits.
pub(crate) fn is_hex(text: &str, len: usize) -> bool {
    text.len() == len && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_loading_needs_is_wanted() {
        let files = [
            ".gitattributes",
            "README.md",
            "config.json",
            "generation_config.json",
            "chat_template.jinja",
            "merges.txt",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "tokenizer.model",
            "onnx/config.json",
            "modeling_x.py",
        ];
        assert_eq!(
            wanted("a/b", &files).unwrap(),
            [
                "config.json",
                "generation_config.json",
                "chat_template.jinja",
                "merges.txt",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
                "tokenizer.model",
            ]
        );
        assert_eq!(wanted("a/b", &["adapter_model.safetensors"]).unwrap(), ["adapter_model.safetensors"]);
        assert!(wanted("a/b", &["config.json"]).unwrap_err().to_string().contains("a/b has no safetensors file"));
    }
}
