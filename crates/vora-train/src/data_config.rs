//! The run file's `data`: what is learned from, and what is asked afterwards.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use vora_data::scenes::{ScenesConfig, Split};

/// The data: what is learned from, and what is asked afterwards.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// What is learned from.
    pub train: TrainData,
    /// Held-out data by the name of its split.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub eval: BTreeMap<String, EvalData>,
}

/// What is learned from: `scenes`, or annotations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainData {
    /// Procedural pictures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scenes: Option<ScenesConfig>,
    /// Where annotations lie.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_fetch: Option<DataFetch>,
    /// How annotations become samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_preprocess: Option<DataPreprocess>,
    /// Whether rows take as many samples as fit into `data_preprocess.max_seq_len` tokens; they see nothing of each
    /// other, and a batch has up to `per_device_train_batch_size` rows. Then `max_steps` must be given.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub packing: bool,
}

/// A held-out split: another stream of the training data's scenes, or annotations.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalData {
    /// A split of the scenes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<Split>,
    /// Where annotations lie.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_fetch: Option<DataFetch>,
    /// How many samples are asked about.
    #[serde(default = "two_hundred")]
    pub samples: usize,
    /// Questions about a picture of the split; absent: as many as in training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub questions_per_image: Option<usize>,
}

/// Where annotations lie.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataFetch {
    /// One entry a source.
    pub data_paths: Vec<DataPath>,
}

/// One source: a file of records and the folder that its pictures lie in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataPath {
    /// A JSON object a line.
    pub anno_path: PathBuf,
    /// Where its pictures are; empty for text alone.
    #[serde(default)]
    pub image_folder: PathBuf,
}

/// How annotations become samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataPreprocess {
    /// A record's key for its pictures.
    pub frames_key: String,
    /// A record's key for its conversation.
    pub label_key: String,
    /// A sample with more tokens is refused.
    pub max_seq_len: usize,
    /// Taken from published recipes, without effect here: the tokenizer is the LLM's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// Without effect: one limit serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_prompt_len: Option<usize>,
    /// Without effect: turns are written as the LLM's own chat template writes them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vqa_processor_params: Option<VqaProcessorParams>,
    /// Without effect: one frame a picture.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_segments: Option<usize>,
    /// Without effect: pictures go through the processor that lies beside the teacher.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frames_ops: Option<BTreeMap<String, BTreeMap<String, String>>>,
}

impl Default for DataPreprocess {
    fn default() -> Self {
        Self {
            frames_key: "frames".into(),
            label_key: "conversations".into(),
            max_seq_len: 2048,
            tokenizer: None,
            max_prompt_len: None,
            vqa_processor_params: None,
            num_segments: None,
            frames_ops: None,
        }
    }
}

/// The published recipes' way to write a chat template.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VqaProcessorParams {
    /// What a conversation begins with.
    pub system_message: String,
    /// What stands before each turn.
    pub roles: Vec<String>,
}

fn two_hundred() -> usize {
    200
}

impl DataConfig {
    pub(crate) fn validate(&self, image_size: i64) -> Result<()> {
        match (&self.train.scenes, &self.train.data_fetch) {
            (None, None) => bail!("data.train has neither `scenes` nor `data_fetch`"),
            (Some(_), Some(_)) => bail!("data.train has both `scenes` and `data_fetch`, it takes one of them"),
            (Some(scenes), None) => {
                scenes.validate().map_err(|error| anyhow!("data.train.{error}"))?;
                ensure!(
                    i64::from(scenes.image_size) == image_size,
                    "data.train.scenes.image_size is {}, model.image_size is {image_size}: they must be the same",
                    scenes.image_size
                );
            }
            (None, Some(fetch)) => fetch.validate("data.train")?,
        }
        for (name, eval) in &self.eval {
            ensure!(eval.samples >= 1, "data.eval.{name}.samples is 0, it must be at least 1");
            ensure!(
                eval.questions_per_image != Some(0),
                "data.eval.{name}.questions_per_image is 0, it must be at least 1"
            );
            match (&eval.split, &eval.data_fetch) {
                (Some(_), Some(_)) | (None, None) => {
                    bail!("data.eval.{name} must have one of `split` (of the scenes) and `data_fetch`")
                }
                (Some(_), None) => ensure!(
                    self.train.scenes.is_some(),
                    "data.eval.{name}.split names a split of the scenes, but data.train has no `scenes`"
                ),
                (None, Some(fetch)) => {
                    fetch.validate(&format!("data.eval.{name}"))?;
                    ensure!(
                        eval.questions_per_image.is_none(),
                        "data.eval.{name}.questions_per_image is for a split of the scenes, annotations hold their own"
                    );
                }
            }
        }
        Ok(())
    }
}

impl DataFetch {
    fn validate(&self, key: &str) -> Result<()> {
        ensure!(!self.data_paths.is_empty(), "{key}.data_fetch.data_paths is empty");
        Ok(())
    }
}
