//! What lies beside a model's weights: the files of its tokenizer, its chat template, its image processor.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use vora_files::write_bytes;
use vora_image::ImageProcessor;

/// How pictures are prepared.
pub const PREPROCESSOR: &str = "preprocessor_config.json";

/// The chat template that is read before whatever else a folder says of templates.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// The files that a tokenizer and its chat template consist of.
pub const TOKENIZER: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "chat_template.json",
    "generation_config.json",
];

/// Takes what stands beside a model's weights from one of these folders to another: the tokenizer's files as they are,
/// and the image processor as it is read there, as other files of the folder may say something of it too.
///
/// # Errors
/// Names the file that cannot be read or written.
pub fn copy_beside(from: &Path, to: &Path) -> Result<()> {
    copy_files(TOKENIZER.into_iter(), from, to)?;
    if ImageProcessor::is_stored(from)? {
        let json = ImageProcessor::open(from)?.to_json();
        write_bytes(&to.join(PREPROCESSOR), serde_json::to_string_pretty(&json)?.as_bytes())?;
    }
    Ok(())
}

/// Copies those of the named files that `from` has.
///
/// # Errors
/// Names the file that cannot be read or written.
pub fn copy_files(names: impl Iterator<Item = &'static str>, from: &Path, to: &Path) -> Result<()> {
    for name in names {
        let source = from.join(name);
        if source.exists() {
            let bytes = fs::read(&source).with_context(|| format!("cannot read {}", source.display()))?;
            write_bytes(&to.join(name), &bytes)?;
        }
    }
    Ok(())
}
