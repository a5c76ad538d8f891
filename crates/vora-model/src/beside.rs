//! What lies beside a model's weights: the files of its tokenizer, its chat template, its image processor.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use vora_files::write_bytes;
use vora_image::ImageProcessor;
use vora_text::special_tokens_by_class;

/// How pictures are prepared.
pub const PREPROCESSOR: &str = "preprocessor_config.json";

/// What goes between pictures, text and the model: classes of HF's, and their settings.
pub(crate) const PROCESSOR: &str = "processor_config.json";

/// The files that may say how pictures and videos become pixels.
pub(crate) const PROCESSORS: [&str; 3] = [PREPROCESSOR, PROCESSOR, "video_preprocessor_config.json"];

/// The chat template that is read before whatever else a folder says of templates.
pub const CHAT_TEMPLATE: &str = "chat_template.jinja";

/// The files of a chat template, which go before the one in `tokenizer_config.json`.
pub(crate) const CHAT_TEMPLATES: [&str; 2] = [CHAT_TEMPLATE, "chat_template.json"];

/// The tokenizer itself.
pub const TOKENIZER: &str = "tokenizer.json";

/// What is said about the tokenizer.
pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// The files that a tokenizer consists of.
const TOKENIZER_FILES: [&str; 4] = [TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"];

/// Files that say once more what `tokenizer.json` says, for tokenizers written in Python; a converted checkpoint keeps
/// them, a trained one has tokens that they may not know.
const PYTHON_TOKENIZER_FILES: [&str; 3] = ["tokenizer.model", "vocab.json", "merges.txt"];

/// What is told about generation, the tokens that end it among others.
pub(crate) const GENERATION: &str = "generation_config.json";

/// The files that a trained model takes along from its language model: tokenizer, chat template, `generation_config.json`.
pub fn text_files() -> impl Iterator<Item = &'static str> {
    TOKENIZER_FILES.into_iter().chain(CHAT_TEMPLATES).chain([GENERATION])
}

/// The files of a tokenizer in whichever language it is written, `tokenizer.json` first.
pub(crate) fn tokenizer_files() -> impl Iterator<Item = &'static str> {
    TOKENIZER_FILES.into_iter().chain(PYTHON_TOKENIZER_FILES)
}

/// Whether a file of this name says how words become tokens, or which tokens end them.
pub(crate) fn is_text_file(name: &str) -> bool {
    text_files().chain(PYTHON_TOKENIZER_FILES).any(|known| known == name)
}

/// Takes what stands beside a model's weights from one of these folders to another: the tokenizer's files as they are,
/// and the image processor as it is read there, as other files of the folder may say something of it too.
///
/// # Errors
/// Names the file that cannot be read or written.
pub fn copy_beside(from: &Path, to: &Path) -> Result<()> {
    copy_text_files(text_files(), from, to)?;
    if ImageProcessor::is_stored(from)? {
        let json = ImageProcessor::open(from)?.to_json();
        write_bytes(&to.join(PREPROCESSOR), serde_json::to_string_pretty(&json)?.as_bytes())?;
    }
    Ok(())
}

/// Copies those of the named text files that `from` has; what a GGUF file says in place of a tokenizer's is written as such. Special tokens that it has by the class of its tokenizer alone are
/// named in the copy: in a folder of another model the same files may stand for another class.
///
/// # Errors
/// Names the file that cannot be read or written.
pub fn copy_text_files(names: impl Iterator<Item = &'static str>, from: &Path, to: &Path) -> Result<()> {
    copy_files(names, from, to)?;
    if !from.join(TOKENIZER).exists()
        && let Some((tokenizer, config)) = vora_gguf::folder::tokenizer(from)?
    {
        write_bytes(&to.join(TOKENIZER), &serde_json::to_vec_pretty(&tokenizer)?)?;
        if !from.join(TOKENIZER_CONFIG).exists() {
            write_bytes(&to.join(TOKENIZER_CONFIG), &serde_json::to_vec_pretty(&config)?)?;
        }
    }
    let tokens = special_tokens_by_class(from)?;
    if tokens.is_empty() {
        return Ok(());
    }
    let path = to.join(TOKENIZER_CONFIG);
    let text = if path.exists() { fs::read_to_string(&path) } else { Ok("{}".to_owned()) };
    let text = text.with_context(|| format!("cannot read {}", path.display()))?;
    write_bytes(&path, with_entries(&text, &tokens).as_bytes())
}

/// The JSON object `text` with more entries at its start: the order of the others says something too.
fn with_entries(text: &str, entries: &[(&str, &str)]) -> String {
    let entries: Vec<_> = entries.iter().map(|(key, value)| format!("{key:?}: {value:?}")).collect();
    let rest = text.trim_start().trim_start_matches('{').trim_start();
    let comma = if rest.starts_with('}') { "" } else { ", " };
    format!("{{{}{comma}{rest}", entries.join(", "))
}

/// Copies those of the named files that `from` has.
///
/// # Errors
/// Names the file that cannot be read or written.
fn copy_files(names: impl Iterator<Item = &'static str>, from: &Path, to: &Path) -> Result<()> {
    for name in names {
        let source = from.join(name);
        if source.exists() {
            let bytes = fs::read(&source).with_context(|| format!("cannot read {}", source.display()))?;
            write_bytes(&to.join(name), &bytes)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_class_names_is_named_in_a_folder_of_another_model() {
        let [from, to] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        fs::copy(fixtures::root().join("tiny/tokenizer/tokenizer.json"), from.path().join(TOKENIZER)).unwrap();
        fs::write(to.path().join("config.json"), r#"{"model_type": "llava"}"#).unwrap();
        let write = |text: &str| fs::write(from.path().join(TOKENIZER_CONFIG), text).unwrap();
        let special = |folder: &Path| vora_text::special_tokens(folder).unwrap();
        for config in [
            r#"{"tokenizer_class": "GPT2Tokenizer"}"#,
            r#"{ "tokenizer_class": "GPT2Tokenizer", "z_token": "<z>", "a_token": "<a>", "bos_token": null}"#,
            r#"{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}"#,
        ] {
            write(config);
            copy_beside(from.path(), to.path()).unwrap();
            assert_eq!(special(to.path()), special(from.path()), "{config}");
        }
        assert_eq!(
            fs::read(to.path().join(TOKENIZER_CONFIG)).unwrap(),
            fs::read(from.path().join(TOKENIZER_CONFIG)).unwrap()
        );
        // No file but the tokenizer's own, and a model whose type has a class.
        fs::remove_file(from.path().join(TOKENIZER_CONFIG)).unwrap();
        fs::remove_file(to.path().join(TOKENIZER_CONFIG)).unwrap();
        fs::write(from.path().join("config.json"), r#"{"model_type": "qwen2"}"#).unwrap();
        copy_beside(from.path(), to.path()).unwrap();
        assert_eq!(special(to.path()), special(from.path()));
        assert_eq!(special(to.path()).len(), 3);
    }
}
