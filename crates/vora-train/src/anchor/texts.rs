//! The anchor's texts: tokens, from records or from the LLM itself, and the file that a run keeps them in.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use vora_data::{Preparation, SampleMaker, Source};
use vora_files::write_bytes;
use vora_llm::CausalLm;
use vora_recipe::TextAnchor;

use super::held::Held;
use super::write::write;

/// The file of a run folder that holds them.
const FILE: &str = "text_anchor.json";

/// The texts, each of two tokens or more.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Texts {
    texts: Vec<Text>,
}

/// One text.
#[derive(Debug, Serialize, Deserialize)]
struct Text {
    #[serde(flatten)]
    held: Held,
    /// The same to be read by people.
    text: String,
}

impl Texts {
    /// The texts of a run that goes on, from its folder.
    ///
    /// # Errors
    /// Where the file is not there or none of ours.
    pub(crate) fn open(run: &Path) -> Result<Self> {
        let path = run.join(FILE);
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} holds no anchor's texts", path.display()))
    }

    /// The file's content, for processes that do not read it.
    pub(crate) fn to_bytes(&self) -> Result<Vec<u8>> {
        Ok(serde_json::to_vec_pretty(self)?)
    }

    /// What [`Self::to_bytes`] made.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Ok(serde_json::from_slice(bytes)?)
    }

    /// Keeps them for when the run goes on.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub(crate) fn save(&self, run: &Path) -> Result<()> {
        write_bytes(&run.join(FILE), &self.to_bytes()?)
    }

    /// `count` texts that the LLM writes.
    ///
    /// # Errors
    /// See [`write`].
    pub(crate) fn written(
        llm: &CausalLm,
        preparation: &Preparation,
        config: &TextAnchor,
        count: usize,
        seed: u64,
    ) -> Result<Self> {
        Self::of(write(llm, preparation, config, count, seed)?, preparation)
    }

    /// The first `count` texts of `source`, whose records must have no pictures; records that are longer than a text become
    /// several.
    ///
    /// # Errors
    /// A record that is bad or has a picture, and where no text has two tokens.
    pub(crate) fn from_records(
        source: &dyn Source,
        maker: &Arc<SampleMaker>,
        config: &TextAnchor,
        count: usize,
    ) -> Result<Self> {
        let mut texts = Vec::new();
        for index in 0..source.len().unwrap_or(u64::MAX) {
            if texts.len() >= count {
                break;
            }
            let sample = source.sample(index)?;
            ensure!(sample.images.is_empty(), "record {} has a picture: an anchor's texts have none", sample.id);
            let chunks = sample.input_ids.chunks(config.max_length).filter(|ids| ids.len() > 1);
            texts.extend(chunks.map(|ids| Held { ids: ids.to_vec(), from: 0 }));
        }
        texts.truncate(count);
        ensure!(!texts.is_empty(), "no record has a text of two tokens or more");
        Self::of(texts, maker.preparation())
    }

    fn of(texts: Vec<Held>, preparation: &Preparation) -> Result<Self> {
        let text = |held: Held| Ok(Text { text: preparation.tokenizer.decode(&held.ids, false)?, held });
        Ok(Self { texts: texts.into_iter().map(text).collect::<Result<_>>()? })
    }

    /// Each of them.
    pub(crate) fn held(&self) -> impl Iterator<Item = &Held> {
        self.texts.iter().map(|text| &text.held)
    }
}
