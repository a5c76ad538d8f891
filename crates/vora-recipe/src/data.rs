//! The run file's `data`: what is learned from, and what is asked afterwards.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use anyhow::{Result, anyhow, bail, ensure};
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use vora_data::scenes::{QuestionKind, ScenesConfig, Split};

use crate::model::ModelConfig;

/// The data: what is learned from, and what is asked afterwards.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// What is learned from.
    pub train: TrainData,
    /// Held-out data by the name of its split.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub eval: BTreeMap<String, EvalData>,
}

/// What is learned from: `scenes`, or annotations, or both by weight; or what a program brings along.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainData {
    /// The name of a source that a program makes itself and hands to the trainer (`Trainer::with_data`), in place of all
    /// others; `vora` has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Procedural pictures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scenes: Option<ScenesConfig>,
    /// The scenes' share beside annotations, as `weight` is theirs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scenes_weight: Option<f64>,
    /// Whether a batch is either of samples with pictures or of text alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub group_by_modality: bool,
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

/// A held-out split: another stream of the training data's scenes, or annotations; or what a program brings along.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvalData {
    /// As `data.train.source`: the program makes the split itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
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
    /// Narrowest and widest pictures of the split, width over height; `[1, 1]` makes squares; absent: as in training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aspects: Option<[f32; 2]>,
    /// Shortest and longest sides of its pictures, in pixels; absent: as in training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sides: Option<[u32; 2]>,
    /// How often each question type is asked about a picture of the split; absent: as in training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kinds: Option<BTreeMap<QuestionKind, f64>>,
    /// The same for pictures of several objects; absent: `kinds` where that is given, else as in training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kinds_of_several: Option<BTreeMap<QuestionKind, f64>>,
    /// Shares of pictures with one, two and three objects in the split; absent: as in training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objects: Option<[f64; 3]>,
    /// Share of the split's objects with a colour that has no name; absent: as in training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unnamed_share: Option<f64>,
}

impl Default for EvalData {
    fn default() -> Self {
        Self {
            source: None,
            split: None,
            data_fetch: None,
            samples: two_hundred(),
            questions_per_image: None,
            aspects: None,
            sides: None,
            kinds: None,
            kinds_of_several: None,
            objects: None,
            unnamed_share: None,
        }
    }
}

impl EvalData {
    /// The scenes of the split: those of training, but for what is said otherwise here.
    pub fn scenes(&self, train: ScenesConfig) -> ScenesConfig {
        ScenesConfig {
            questions_per_image: self.questions_per_image.unwrap_or(train.questions_per_image),
            kinds_of_several: match &self.kinds_of_several {
                Some(kinds) => Some(kinds.clone()),
                None => train.kinds_of_several.filter(|_| self.kinds.is_none()),
            },
            aspects: self.aspects.or(train.aspects),
            sides: self.sides.or(train.sides),
            kinds: self.kinds.clone().unwrap_or(train.kinds),
            objects: self.objects.unwrap_or(train.objects),
            unnamed_share: self.unnamed_share.unwrap_or(train.unnamed_share),
            ..train
        }
    }
}

/// Where annotations lie.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataFetch {
    /// One entry a source.
    pub data_paths: Vec<DataPath>,
}

/// One source: files of records, and the folder that pictures lie in where JSON names them.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataPath {
    /// A file, a folder of shards or a pattern such as `train-*.parquet`: JSON lines or one JSON array, parquet with
    /// the pictures' bytes, WebDataset's tar; what it is, its content says. Of compressed files tar.gz alone is read: others, as
    /// `.jsonl.gz` and `.tar.zst`, are named with what decompresses them.
    pub anno_path: PathBuf,
    /// Where its pictures are: records name them from there, or by whole paths into it. Empty for text alone.
    #[serde(default)]
    pub image_folder: PathBuf,
    /// Its share of the samples, as a part of the sum of all weights: of every source or of none. The data then never
    /// ends. Without weights each pass has every record once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<f64>,
}

/// How annotations become samples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataPreprocess {
    /// A record's key for its pictures; those under `images` or `image` are read as well.
    pub frames_key: String,
    /// A record's key for its conversation.
    pub label_key: String,
    /// The most tokens of a sample, pictures included, or of a row with `packing`: a longer one loses turns at its end, or is
    /// left out where not even its first answer fits. More than the LLM's context (`max_position_embeddings`) is refused,
    /// but for `packing`. Absent: 2048, and a sample beyond the context is told of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_seq_len: Option<usize>,
    /// Taken from published recipes, without effect here: the tokenizer is the LLM's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// Without effect: one limit serves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_prompt_len: Option<usize>,
    /// How turns are written, where `model.chat_template` does not say it; absent: as the LLM's own chat template
    /// writes them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vqa_processor_params: Option<VqaProcessorParams>,
    /// Without effect: one frame a picture.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_segments: Option<usize>,
    /// What pictures go through; absent: the processor of `model.pretrained`, or that of the teacher.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub frames_ops: Option<FramesOps>,
}

impl Default for DataPreprocess {
    fn default() -> Self {
        Self {
            frames_key: "frames".into(),
            label_key: "conversations".into(),
            max_seq_len: None,
            tokenizer: None,
            max_prompt_len: None,
            vqa_processor_params: None,
            num_segments: None,
            frames_ops: None,
        }
    }
}

impl DataPreprocess {
    /// The most tokens of a sample, or of a row with `packing`.
    pub fn max_length(&self) -> usize {
        self.max_seq_len.unwrap_or(2048)
    }

    /// Whether it has keys that only recipes for the published code have.
    pub fn is_published(&self) -> bool {
        self.vqa_processor_params.is_some() || self.frames_ops.is_some()
    }
}

/// The published recipes' way to write a chat template; what a recipe leaves out is as their code has it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VqaProcessorParams {
    /// What a conversation begins with, before the system message.
    pub system_start: String,
    /// What follows the system message.
    pub system_end: String,
    /// The system message of conversations without one.
    #[serde(deserialize_with = "text_or_null")]
    pub system_message: String,
    /// What stands before a question, and between it and its answer.
    pub roles: [String; 2],
}

fn text_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl Default for VqaProcessorParams {
    fn default() -> Self {
        let roles = ["\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"];
        Self {
            system_start: "<|im_start|>system\n".to_owned(),
            system_end: "<|im_end|>".to_owned(),
            system_message: String::new(),
            roles: roles.map(str::to_owned),
        }
    }
}

impl VqaProcessorParams {
    /// The same as a chat template (Jinja). An answer ends with the tokenizer's eos token.
    pub fn chat_template(&self) -> String {
        let quoted = |text: &str| {
            let escaped = text.replace('\\', "\\\\").replace('\'', "\\'").replace('\n', "\\n").replace('\r', "\\r");
            format!("'{escaped}'")
        };
        let [question, answer] = &self.roles;
        let [start, end, system, question, answer] =
            [&self.system_start, &self.system_end, &self.system_message, question, answer].map(|text| quoted(text));
        format!(
            "{{%- if messages and messages[0]['role'] == 'system' %}}\
             {{%- set system = messages[0]['content'] %}}{{%- set turns = messages[1:] %}}\
             {{%- else %}}{{%- set system = {system} %}}{{%- set turns = messages %}}{{%- endif %}}\
             {{{{- {start} + system + {end} }}}}\
             {{%- for turn in turns %}}\
             {{%- if turn['role'] == 'user' %}}{{{{- {question} + turn['content'] + {answer} }}}}\
             {{%- else %}}{{{{- turn['content'] + eos_token }}}}{{%- endif %}}\
             {{%- endfor %}}"
        )
    }
}

/// What the published recipes' pictures go through: a processor by its folder or name alone, or these by turns.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum FramesOps {
    /// A folder of a vision model, or a name on the hub: its own processor.
    Processor(String),
    /// Steps by name.
    Steps(Steps),
}

/// The steps that are known.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Steps {
    /// Bars make a square of a picture.
    #[serde(default, rename = "PILExpand2Square", skip_serializing_if = "Option::is_none")]
    pub expand2square: Option<Expand2Square>,
    /// A vision model's own processor.
    #[serde(rename = "HFImageTransform")]
    pub transform: HfImageTransform,
}

/// The colour of the bars.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Expand2Square {
    /// Red, green and blue from 0 to 255.
    pub background_color: [u8; 3],
}

/// Whose processor it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HfImageTransform {
    /// A folder of a vision model, or a name on the hub.
    pub path: String,
}

impl<'de> Deserialize<'de> for FramesOps {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = FramesOps;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vision model's folder or name, or `PILExpand2Square` and `HFImageTransform`")
            }

            fn visit_str<E: de::Error>(self, path: &str) -> Result<FramesOps, E> {
                Ok(FramesOps::Processor(path.to_owned()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<FramesOps, A::Error> {
                Steps::deserialize(MapAccessDeserializer::new(map)).map(FramesOps::Steps)
            }
        }
        deserializer.deserialize_any(Either)
    }
}

impl FramesOps {
    /// Whose processor pictures go through.
    pub fn path(&self) -> &str {
        match self {
            Self::Processor(path) => path,
            Self::Steps(steps) => &steps.transform.path,
        }
    }

    /// The colour of the bars that make squares of pictures before; none where there are none.
    pub fn background_color(&self) -> Option<[u8; 3]> {
        match self {
            Self::Processor(_) => None,
            Self::Steps(steps) => steps.expand2square.as_ref().map(|expand| expand.background_color),
        }
    }
}

fn two_hundred() -> usize {
    200
}

impl DataConfig {
    pub(crate) fn validate(&self, model: &ModelConfig) -> Result<()> {
        let is_own = self.train.source.is_some();
        ensure!(
            !is_own || (self.train.scenes.is_none() && self.train.data_fetch.is_none()),
            "data.train has a `source` of a program's own, and `scenes` or `data_fetch` beside it"
        );
        match (&self.train.scenes, &self.train.data_fetch) {
            (None, None) => ensure!(is_own, "data.train has neither `scenes` nor `data_fetch`"),
            (Some(_), Some(fetch)) => ensure!(
                self.train.scenes_weight.is_some() && fetch.has_weights(),
                "data.train has both `scenes` and `data_fetch`: give `scenes_weight`, and every one of \
                 data_fetch.data_paths a `weight`"
            ),
            _ => {}
        }
        if let Some(weight) = self.train.scenes_weight {
            ensure!(weight > 0.0 && weight.is_finite(), "data.train.scenes_weight is {weight}, it must be above 0");
            ensure!(
                self.train.scenes.is_some() && self.train.data_fetch.is_some(),
                "data.train.scenes_weight is for `scenes` and `data_fetch` mixed, it lacks one of them"
            );
        }
        if let Some(scenes) = &self.train.scenes {
            scenes.validate().map_err(|error| anyhow!("data.train.{error}"))?;
            ensure!(
                i64::from(scenes.image_size) == model.image_size || model.keeps_shape(),
                "data.train.scenes.image_size is {}, model.image_size is {}: they must be the same",
                scenes.image_size,
                model.image_size
            );
        }
        if let Some(fetch) = &self.train.data_fetch {
            fetch.validate("data.train")?;
        }
        for (name, eval) in &self.eval {
            ensure!(
                name.chars().all(|c| c.is_alphanumeric() || "_-.".contains(c))
                    && name.starts_with(char::is_alphanumeric),
                "data.eval has a split `{name}`: names of files are made of it, so it takes letters, digits, `_`, `-` and `.`, a letter or digit first"
            );
            ensure!(eval.samples >= 1, "data.eval.{name}.samples is 0, it must be at least 1");
            if eval.source.is_some() {
                ensure!(
                    eval.split.is_none() && eval.data_fetch.is_none(),
                    "data.eval.{name} has a `source` of a program's own, and `split` or `data_fetch` beside it"
                );
                continue;
            }
            match (&eval.split, &eval.data_fetch) {
                (Some(_), Some(_)) | (None, None) => {
                    bail!("data.eval.{name} must have one of `split` (of the scenes) and `data_fetch`")
                }
                (Some(_), None) => {
                    let Some(train) = &self.train.scenes else {
                        bail!("data.eval.{name}.split names a split of the scenes, but data.train has no `scenes`")
                    };
                    let scenes = eval.scenes(train.clone());
                    let valid = scenes.validate();
                    valid.map_err(|error| {
                        anyhow!("data.eval.{name}{}", error.to_string().trim_start_matches("scenes"))
                    })?;
                }
                (None, Some(fetch)) => {
                    fetch.validate(&format!("data.eval.{name}"))?;
                    ensure!(
                        fetch.data_paths.iter().all(|path| path.weight.is_none()),
                        "data.eval.{name}.data_fetch has a `weight`, but is asked about from its first record on"
                    );
                    let of_scenes = [
                        ("questions_per_image", eval.questions_per_image.is_some()),
                        ("aspects", eval.aspects.is_some()),
                        ("sides", eval.sides.is_some()),
                        ("kinds", eval.kinds.is_some()),
                        ("kinds_of_several", eval.kinds_of_several.is_some()),
                        ("objects", eval.objects.is_some()),
                        ("unnamed_share", eval.unnamed_share.is_some()),
                    ];
                    for (key, is_given) in of_scenes {
                        ensure!(
                            !is_given,
                            "data.eval.{name}.{key} is for a split of the scenes, annotations hold their own questions"
                        );
                    }
                }
            }
        }
        Ok(())
    }
}

impl DataFetch {
    fn validate(&self, key: &str) -> Result<()> {
        let key = format!("{key}.data_fetch.data_paths");
        ensure!(!self.data_paths.is_empty(), "{key} is empty");
        for (idx, path) in self.data_paths.iter().enumerate() {
            let weight = path.weight.unwrap_or(1.0);
            ensure!(weight > 0.0 && weight.is_finite(), "{key}[{idx}].weight is {weight}, it must be above 0");
        }
        let weighted = self.data_paths.iter().filter(|path| path.weight.is_some()).count();
        ensure!(
            weighted == 0 || weighted == self.data_paths.len(),
            "{weighted} of {} {key} have a `weight`: give it to all or to none",
            self.data_paths.len()
        );
        Ok(())
    }

    /// Whether sources are mixed by weight.
    pub fn has_weights(&self) -> bool {
        self.data_paths.iter().all(|path| path.weight.is_some())
    }
}

#[cfg(test)]
mod tests {
    use vora_text::{ChatTemplate, Message, Part, Piece, Tokenizer};

    use super::*;

    /// Text that the model reads, and in brackets what it learns to say.
    fn chat(params: &VqaProcessorParams, messages: &[Message]) -> String {
        let folder = fixtures::root().join("tiny/tokenizer");
        let tokenizer = Tokenizer::open(&folder).unwrap();
        let special = vora_text::special_tokens(&folder).unwrap();
        let chat = ChatTemplate::new(&params.chat_template(), special, "a recipe").unwrap();
        let text = |pieces: Vec<Piece>| -> String {
            let piece = |piece: Piece| match piece {
                Piece::Image => "#".to_owned(),
                Piece::Text { ids, supervised } => {
                    let text = tokenizer.decode(&ids, false).unwrap();
                    if supervised { format!("[{text}]") } else { text }
                }
            };
            pieces.into_iter().map(piece).collect()
        };
        let (last, before) = messages.split_last().unwrap();
        assert_eq!(last.role, "assistant");
        // What is asked is what was learned from, up to the answer.
        let (whole, prompt) = (chat.encode_chat(&tokenizer, messages), chat.encode_prompt(&tokenizer, before));
        let (whole, prompt) = (text(whole.unwrap()), text(prompt.unwrap()));
        assert_eq!(whole.rsplit_once('[').unwrap().0.replace(['[', ']'], ""), prompt);
        whole
    }

    #[test]
    fn a_recipes_system_message_and_roles_are_used() {
        let question = |text: &str| Message::of_parts("user", vec![Part::Image, Part::Text(text.to_owned())]);
        let turns = [
            question("\nWhat?"),
            Message::new("assistant", "A cat."),
            Message::new("user", "Why?"),
            Message::new("assistant", "It is."),
        ];
        let params: VqaProcessorParams =
            crate::overrides::from_yaml("system_message: You are a helpful assistant.").unwrap();
        let expected = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n#\nWhat?<|im_end|>\n\
                        <|im_start|>assistant\n[A cat.<|im_end|>]\n<|im_start|>user\nWhy?<|im_end|>\n\
                        <|im_start|>assistant\n[It is.<|im_end|>]";
        assert_eq!(chat(&params, &turns), expected);
        let own = [&[Message::new("system", "Be brief.")], &turns[..2]].concat();
        assert!(chat(&params, &own).starts_with("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n#"));
        let none: VqaProcessorParams = crate::overrides::from_yaml("system_message: null").unwrap();
        assert!(chat(&none, &turns[..2]).starts_with("<|im_start|>system\n<|im_end|>\n<|im_start|>user"));
        // Whatever characters they are made of.
        let params = VqaProcessorParams {
            system_start: "a'\\\"".to_owned(),
            system_end: "{{ b }}\n".to_owned(),
            system_message: "{% c %}".to_owned(),
            roles: ["Q: ".to_owned(), "\nA:\n".to_owned()],
        };
        assert_eq!(chat(&params, &turns[2..]), "a'\\\"{% c %}{{ b }}\nQ: Why?\nA:\n[It is.<|im_end|>]");
    }

    fn validate(yaml: &str) -> Result<()> {
        let config: DataConfig = crate::overrides::from_yaml(yaml)?;
        config.validate(&ModelConfig { image_size: 56, ..ModelConfig::default() })
    }

    #[test]
    fn weights_are_of_all_or_of_none() {
        let paths = |a: &str, b: &str| {
            format!("train: {{ data_fetch: {{ data_paths: [{{ anno_path: a{a} }}, {{ anno_path: b{b} }}] }} }}")
        };
        validate(&paths("", "")).unwrap();
        validate(&paths(", weight: 2", ", weight: 0.5")).unwrap();
        let error = |yaml: &str| validate(yaml).unwrap_err().to_string();
        assert!(error(&paths(", weight: 2", "")).contains("1 of 2 data.train.data_fetch.data_paths have a `weight`"));
        assert!(error(&paths(", weight: 2", ", weight: 0")).contains("data_paths[1].weight is 0"));
        let scenes = |scenes: &str, path: &str| {
            format!("train: {{ scenes: {{}}{scenes}, data_fetch: {{ data_paths: [{{ anno_path: a{path} }}] }} }}")
        };
        validate(&scenes(", scenes_weight: 1", ", weight: 3")).unwrap();
        for (scene, path) in [("", ""), (", scenes_weight: 1", ""), ("", ", weight: 3")] {
            assert!(error(&scenes(scene, path)).contains("give `scenes_weight`"), "{}", error(&scenes(scene, path)));
        }
        assert!(error(&scenes(", scenes_weight: -1", ", weight: 3")).contains("scenes_weight is -1"));
        assert!(error("train: { scenes: {}, scenes_weight: 1 }").contains("it lacks one of them"));
    }
}
