//! The run file: one YAML file is one run. Its keys are those of the published VoRA recipes, which load as they are,
//! and of HF's `TrainingArguments`; what is ours beside them keeps the field's names.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vora_model::VisionEmbeddingType;
use vora_vision::PositionTable;

use crate::anchor::TextAnchor;
use crate::data::{DataConfig, DataPreprocess, VqaProcessorParams};
use crate::distill::{DistillConfig, Pairing};
use crate::loss::{BETA, Loss};
use crate::model::{ModelConfig, ModelType};
use crate::optim::{self, LearningRates, OptimConfig};
use crate::overrides::{Difference, as_text, compare, from_yaml, no_two_names, set};
use crate::schedule::{Curve, Schedule, SchedulerKwargs};

/// One run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// The run folder.
    pub output_dir: PathBuf,
    /// Whether a new run may take a folder that holds another one's checkpoints or `final/`, which are then removed.
    #[serde(default)]
    pub overwrite_output_dir: bool,
    /// What stands over the plot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run_name: Option<String>,
    /// Fixes new weights and the order of the data.
    #[serde(default = "seed")]
    pub seed: u64,
    /// Frozen weights and activations in bf16 (`true`) or f32 (`false`); absent: bf16 where the hardware multiplies it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bf16: Option<bool>,
    /// Frozen weights and activations in f16, the loss scaled so that no gradient vanishes; needs a GPU.
    #[serde(default)]
    pub fp16: bool,

    /// The model.
    pub model: ModelConfig,
    /// The data.
    pub data: DataConfig,
    /// What the data is learned by: `cross_entropy` of the answers, or `dpo`, direct preference optimization, on TRL's
    /// records of preferences (`prompt`, `chosen`, `rejected`, `images`) and on `scenes`, which make right and wrong
    /// answers. DPO's reference is the same model with the adapters off.
    #[serde(default, skip_serializing_if = "Loss::is_default")]
    pub loss: Loss,
    /// TRL's: how strongly DPO holds the model to its reference, the lower the weaker; absent: 0.1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta: Option<f64>,
    /// The teacher's part in the loss.
    #[serde(default)]
    pub distill: DistillConfig,
    /// What keeps the LLM's language, by its own predictions on texts; absent: nothing does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_anchor: Option<TextAnchor>,

    /// Steps of the run; -1 leaves it to `num_train_epochs`.
    #[serde(default = "minus_one")]
    pub max_steps: i64,
    /// Passes over the data, where it has an end.
    #[serde(default = "one")]
    pub num_train_epochs: f64,
    /// Samples in one forward pass, of each process where several train.
    #[serde(default = "eight")]
    pub per_device_train_batch_size: usize,
    /// Samples in one forward pass of an evaluation.
    #[serde(default = "eight")]
    pub per_device_eval_batch_size: usize,
    /// Forward passes to one step; the step is that of one batch as large as all of them.
    #[serde(default = "one_usize")]
    pub gradient_accumulation_steps: usize,
    /// Whether the training data is shuffled.
    #[serde(default = "yes")]
    pub shuffle: bool,
    /// Whether the backward pass computes each decoder layer anew instead of keeping what it made on the way: less
    /// memory for about a third more time.
    #[serde(default)]
    pub gradient_checkpointing: bool,
    /// Threads that make samples. From the second on each has a core that libtorch leaves to it, unless `OMP_NUM_THREADS`
    /// says how many compute.
    #[serde(default = "one_usize")]
    pub dataloader_num_workers: usize,

    /// Learning rate at a schedule factor of 1.
    #[serde(default = "optim::learning_rate")]
    pub learning_rate: f64,
    /// Parts of the model that learn at another rate.
    #[serde(default)]
    pub learning_rates: LearningRates,
    /// How the rate goes on after the warm-up.
    #[serde(default)]
    pub lr_scheduler_type: Curve,
    /// What some of these need beside the steps.
    #[serde(default)]
    pub lr_scheduler_kwargs: SchedulerKwargs,
    /// Steps of warm-up.
    #[serde(default)]
    pub warmup_steps: u64,
    /// Share of the run that is warm-up, where `warmup_steps` is 0.
    #[serde(default)]
    pub warmup_ratio: f64,
    /// Decoupled weight decay of matrices.
    #[serde(default)]
    pub weight_decay: f64,
    /// AdamW's decay of the mean gradient.
    #[serde(default = "optim::adam_beta1")]
    pub adam_beta1: f64,
    /// AdamW's decay of the mean squared gradient.
    #[serde(default = "optim::adam_beta2")]
    pub adam_beta2: f64,
    /// Added to AdamW's denominator.
    #[serde(default = "optim::adam_epsilon")]
    pub adam_epsilon: f64,
    /// The gradient is scaled down to this norm; 0 leaves it.
    #[serde(default = "one")]
    pub max_grad_norm: f64,

    /// DeepSpeed's `zero_optimization.stage`, where several processes train: 1 leaves to each a share of AdamW's running
    /// means, 0 keeps all of them in each. 3 leaves to each a share of the frozen weights of the LLM's blocks as well, which a
    /// block gathers while it computes; it needs `gradient_checkpointing`.
    #[serde(default = "one_u64")]
    pub zero_stage: u64,
    /// HF's: how tensors go between the GPUs of several processes. Absent: `nccl` where there are GPUs and NCCL's library, else
    /// `gloo`, which takes them by way of the host. Where it is set and `WORLD_SIZE` is 1, one process goes the ways of several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ddp_backend: Option<DdpBackend>,
    /// HF's: seconds that a process waits for the others, to begin and in a step, before it ends and names who is missing. One
    /// that is gone or frozen is found by its silence, within half a minute.
    #[serde(default = "half_an_hour")]
    pub ddp_timeout: u64,

    /// Decay of an exponential moving average of the trained weights, which evaluations see and `final/` holds in their
    /// place; absent: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema_decay: Option<f64>,

    /// Steps between two lines of metrics.
    #[serde(default = "one_u64")]
    pub logging_steps: u64,
    /// Whether each process writes lines of its own too, `metrics-rank-N.jsonl`: the losses of its samples, the time of a step
    /// and how much of it was spent waiting for others, memory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub log_on_each_rank: bool,
    /// When checkpoints are written during the run; there is always one at its end.
    #[serde(default = "steps")]
    pub save_strategy: Strategy,
    /// Steps between checkpoints.
    #[serde(default = "five_hundred")]
    pub save_steps: u64,
    /// How many checkpoints are kept.
    #[serde(default = "three")]
    pub save_total_limit: usize,
    /// HF's: the number of an evaluation by which checkpoints are compared, as `eval_test_exact_match` for the split
    /// `test`. The best one is kept beside the `save_total_limit` newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric_for_best_model: Option<String>,
    /// Whether more of it is better; absent: yes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub greater_is_better: Option<bool>,
    /// Whether `final/` is the best checkpoint in place of the last step.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub load_best_model_at_end: bool,
    /// When the model is evaluated during the run; it always is at its end.
    #[serde(default, alias = "eval_strategy")]
    pub evaluation_strategy: Strategy,
    /// Steps between evaluations.
    #[serde(default = "five_hundred")]
    pub eval_steps: u64,

    /// Taken from published recipes, without effect here, as the run says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tf32: Option<bool>,
    /// HF's: `none` leaves TensorBoard's event files out; without it, with `all` and with `tensorboard` they are
    /// written. Other services of HF's are not reported to, as the run says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report_to: Option<String>,
    /// As `tf32`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wandb_project: Option<String>,
    /// As `tf32`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deepspeed: Option<String>,
}

/// What processes send each other tensors by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DdpBackend {
    /// NCCL, between GPUs; tensors on the host go by Gloo then too.
    Nccl,
    /// Gloo, through the host.
    Gloo,
}

/// When something is done during a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Not before its end.
    #[default]
    No,
    /// At regular steps.
    Steps,
}

fn seed() -> u64 {
    42
}
fn yes() -> bool {
    true
}
fn minus_one() -> i64 {
    -1
}
fn one() -> f64 {
    1.0
}
fn one_usize() -> usize {
    1
}
fn one_u64() -> u64 {
    1
}
fn three() -> usize {
    3
}
fn eight() -> usize {
    8
}
fn five_hundred() -> u64 {
    500
}
fn half_an_hour() -> u64 {
    1800
}
fn steps() -> Strategy {
    Strategy::Steps
}

impl Default for TrainConfig {
    /// What a file that leaves a key out means by it. What every file must give, `output_dir`, `model` and `data`, is empty
    /// here, and is to be given before [`TrainConfig::validate`] passes.
    fn default() -> Self {
        Self {
            output_dir: PathBuf::new(),
            overwrite_output_dir: false,
            run_name: None,
            seed: seed(),
            bf16: None,
            fp16: false,
            model: ModelConfig::default(),
            data: DataConfig::default(),
            loss: Loss::default(),
            beta: None,
            distill: DistillConfig::default(),
            text_anchor: None,
            max_steps: minus_one(),
            num_train_epochs: one(),
            per_device_train_batch_size: eight(),
            per_device_eval_batch_size: eight(),
            gradient_accumulation_steps: one_usize(),
            shuffle: yes(),
            gradient_checkpointing: false,
            dataloader_num_workers: one_usize(),
            learning_rate: optim::learning_rate(),
            learning_rates: LearningRates::default(),
            lr_scheduler_type: Curve::default(),
            lr_scheduler_kwargs: SchedulerKwargs::default(),
            warmup_steps: 0,
            warmup_ratio: 0.0,
            weight_decay: 0.0,
            adam_beta1: optim::adam_beta1(),
            adam_beta2: optim::adam_beta2(),
            adam_epsilon: optim::adam_epsilon(),
            max_grad_norm: one(),
            zero_stage: one_u64(),
            ddp_backend: None,
            ddp_timeout: half_an_hour(),
            ema_decay: None,
            logging_steps: one_u64(),
            log_on_each_rank: false,
            save_strategy: steps(),
            save_steps: five_hundred(),
            save_total_limit: three(),
            metric_for_best_model: None,
            greater_is_better: None,
            load_best_model_at_end: false,
            evaluation_strategy: Strategy::default(),
            eval_steps: five_hundred(),
            tf32: None,
            report_to: None,
            wandb_project: None,
            deepspeed: None,
        }
    }
}

impl TrainConfig {
    /// Reads and validates a run file, with `key.key=value` overrides applied to it.
    ///
    /// # Errors
    /// Names the file, and the line or the override that is wrong.
    pub fn open(path: &Path, overrides: &[String]) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}; --config takes a run file in YAML", path.display()))?;
        Self::parse(&text, overrides).with_context(|| format!("in {}", path.display()))
    }

    /// As [`Self::open`], from text. Errors in the text carry line and column; one in an override names it.
    ///
    /// # Errors
    /// Names the key, with the line or the override that it is in.
    pub fn parse(text: &str, overrides: &[String]) -> Result<Self> {
        let as_written = as_written(text);
        let config = if overrides.is_empty() { as_written? } else { overridden(text, as_written, overrides)? };
        config.checked()
    }

    /// The same of a config that was made in code: what it leaves to the code that it was written for is said, and the rest
    /// is validated as a file's is. The trainer does so with every config that it is given.
    ///
    /// # Errors
    /// As [`TrainConfig::validate`].
    pub fn checked(mut self) -> Result<Self> {
        self.settle();
        self.validate()?;
        Ok(self)
    }

    /// Says what a file leaves to the code that it was written for: a published recipe, known by keys of the published
    /// code's data processor, trains as the released code does.
    fn settle(&mut self) {
        let published = self.data.train.data_preprocess.as_ref().is_some_and(DataPreprocess::is_published);
        self.distill.pairing.get_or_insert(if published { Pairing::Input } else { Pairing::Output });
        if published && self.model.model_type == ModelType::Vora {
            self.model.fuse_adjacent_images.get_or_insert(true);
            if self.model.vision_embedding.unwrap_or_default() == VisionEmbeddingType::Aimv2 {
                self.model.pos_embed.get_or_insert(PositionTable::FirstRows);
            }
        }
    }

    /// The run file with everything in it that was left to defaults.
    ///
    /// # Errors
    /// Where a value cannot be written as YAML.
    pub fn to_yaml(&self) -> Result<String> {
        Ok(serde_saphyr::to_string(self)?)
    }

    /// DPO's beta; none where the run has another loss.
    pub fn dpo_beta(&self) -> Option<f64> {
        (self.loss == Loss::Dpo).then(|| self.beta.unwrap_or(BETA))
    }

    /// What stands in place of the LLM's own chat template.
    pub fn chat_template(&self) -> Option<String> {
        let params = self.data.train.data_preprocess.as_ref().and_then(|p| p.vqa_processor_params.as_ref());
        self.model.chat_template.clone().or_else(|| params.map(VqaProcessorParams::chat_template))
    }

    /// Whether TensorBoard's event files are written.
    pub fn reports_to_tensorboard(&self) -> bool {
        self.report_to.as_deref() != Some("none")
    }

    /// Tokens of a row that samples are packed into; none where each has a row of its own.
    pub fn packed_row_len(&self) -> Option<usize> {
        let preprocess = self.data.train.data_preprocess.clone().unwrap_or_default();
        self.data.train.packing.then_some(preprocess.max_length())
    }

    /// Where the teacher's features are kept, for data that comes again.
    pub fn teacher_cache(&self) -> Option<&Path> {
        self.distill.cache.as_deref().filter(|_| self.data.train.scenes.is_none())
    }

    /// The schedule of a run of `max_steps` steps.
    pub fn schedule(&self, max_steps: u64) -> Schedule {
        let warmup_steps = match self.warmup_steps {
            0 => (self.warmup_ratio * max_steps as f64).ceil() as u64,
            steps => steps,
        };
        Schedule { curve: self.lr_scheduler_type, warmup_steps, max_steps, kwargs: self.lr_scheduler_kwargs }
    }

    /// What the optimizer is told. Rates of parts that only a model of another type has are left out, so that files
    /// which differ in `model` alone are runs to compare.
    pub fn optim(&self) -> OptimConfig {
        OptimConfig {
            learning_rate: self.learning_rate,
            learning_rates: self.learning_rates.without(|part| self.model.model_type.lacks(part)),
            beta1: self.adam_beta1,
            beta2: self.adam_beta2,
            eps: self.adam_epsilon,
            weight_decay: self.weight_decay,
            max_grad_norm: self.max_grad_norm,
        }
    }

    /// Keys whose values differ between two runs.
    ///
    /// # Errors
    /// Where a value cannot be written as JSON.
    pub fn differences(&self, other: &Self) -> Result<Vec<Difference>> {
        let mut found = Vec::new();
        compare("", &serde_json::to_value(self)?, &serde_json::to_value(other)?, &mut found);
        Ok(found)
    }
}

/// The split that a metric is of: `eval_test_exact_match` and `test_exact_match` are the exact match of the split `test`.
pub fn split_of(metric: &str) -> Option<&str> {
    metric.strip_prefix("eval_").unwrap_or(metric).strip_suffix("_exact_match")
}

/// A run file as it stands.
fn as_written(text: &str) -> Result<TrainConfig> {
    let tree = from_yaml::<Value>(text);
    tree.as_ref().map_or(Ok(()), no_two_names)?;
    // Of what is wrong, types tell more than a tree; it tells of numbers that are not finite.
    let config = from_yaml(text)?;
    tree.map(|_| config)
}

/// The run file with the overrides set in it, typed after each so that a wrong one is named.
fn overridden(text: &str, as_written: Result<TrainConfig>, overrides: &[String]) -> Result<TrainConfig> {
    let mut tree: Value = match &as_written {
        Ok(config) => serde_json::to_value(config)?, // a name that is written as a number is text by now
        Err(_) => from_yaml(text)?,
    };
    no_two_names(&tree)?;
    let mut typed = as_written;
    for entry in overrides {
        set(&mut tree, entry)?;
        let found = serde_json::from_value(tree.clone()).or_else(|error| {
            let Some(as_text) = as_text(entry) else { return Err(error) };
            let mut with_text = tree.clone();
            let is_set = set(&mut with_text, &as_text).is_ok();
            let found = serde_json::from_value(with_text.clone()).ok().filter(|_| is_set).ok_or(error)?;
            tree = with_text;
            Ok(found)
        });
        typed = match (typed, found) {
            (_, Ok(config)) => Ok(config),
            // The file itself is incomplete or wrong, and this override did not mend it: that error has a line.
            (Err(error), Err(_)) => Err(error),
            (Ok(_), Err(error)) => return Err(anyhow!("--set {entry}: {error}")),
        };
    }
    typed
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use vora_llm::VisionAttention;

    /// One of the recipes that the published code comes with, with the keys and values that it has there.
    fn published(name: &str) -> String {
        let path = fixtures::root().join("published_recipes").join(format!("{name}.yaml"));
        std::fs::read_to_string(path).unwrap()
    }

    const RECIPES: [&str; 4] = ["pretrain_I8M", "pretrain_I30M_T6M", "pretrain_debug", "finetuning"];

    /// The folder of our own.
    fn recipes() -> PathBuf {
        fixtures::root().join("../crates/vora-train/recipes")
    }

    const SMALL: &str = "\
output_dir: runs/x
max_steps: 10
model:
  llm: somewhere
  patch_size: 14
  image_size: 56
  lora:
    layers: 2
    r: 4
data:
  train:
    scenes: {}
";

    pub(crate) fn set(overrides: &[&str]) -> Result<TrainConfig> {
        let overrides: Vec<String> = overrides.iter().map(|&s| s.to_owned()).collect();
        TrainConfig::parse(SMALL, &overrides)
    }

    #[track_caller]
    pub(crate) fn fails(result: Result<TrainConfig>, texts: &[&str]) {
        let message = format!("{:#}", result.unwrap_err());
        for text in texts {
            assert!(message.contains(text), "`{message}` lacks `{text}`");
        }
    }

    #[test]
    fn the_published_recipes_load_as_they_are() {
        for name in RECIPES {
            let config = TrainConfig::parse(&published(name), &[]).unwrap();
            assert_eq!((config.bf16, config.max_steps, config.seed), (Some(true), -1, 42));
            assert!(config.gradient_checkpointing);
            // They train as the released code does.
            assert_eq!(config.distill.pairing, Some(Pairing::Input));
            let model = &config.model;
            assert_eq!((model.fuse_adjacent_images, model.pos_embed), (Some(true), Some(PositionTable::FirstRows)));
            let lora = model.lora.as_ref().unwrap();
            assert_eq!((lora.layers, lora.target_modules.len()), (24, 7));
            let preprocess = config.data.train.data_preprocess.as_ref().unwrap();
            let ops = preprocess.frames_ops.as_ref().unwrap();
            assert!(ops.path().ends_with("aimv2-huge-patch14-448") && ops.background_color() == Some([0; 3]));
            // Nothing of the conversation or the pictures is without effect.
            let noted: Vec<&str> = config.without_effect().iter().map(|(key, _)| *key).collect();
            let expected = [
                "tf32",
                "report_to",
                "wandb_project",
                "deepspeed",
                "data_preprocess.tokenizer",
                "data_preprocess.max_prompt_len",
            ];
            assert_eq!(noted, expected, "{name}");
        }
        let config = TrainConfig::parse(&published("pretrain_I8M"), &[]).unwrap();
        assert!(config.model.starts_from_teacher() && config.model.adapters().unwrap().r == 1024);
        assert_eq!(config.schedule(1000).factor(50), 0.5);
        let config = TrainConfig::parse(&published("pretrain_I30M_T6M"), &[]).unwrap();
        let sources = &config.data.train.data_fetch.as_ref().unwrap().data_paths;
        assert_eq!((sources.len(), sources[2].image_folder.as_os_str().is_empty()), (3, true));
        // An `r` of -1 attaches nothing, and the paper's second stage is another section.
        let tuning = published("finetuning");
        let model = TrainConfig::parse(&tuning, &[]).unwrap().model;
        assert_eq!((model.pretrained.as_deref(), model.aux_vision.as_deref()), (Some("{your_pretrained_model}"), None));
        assert!(model.lora.as_ref().unwrap().r == -1 && model.adapters().is_none() && model.freezes_llm());
        let all = ["model.lora=null".to_owned(), "model.freeze_llm=false".to_owned()];
        assert!(!TrainConfig::parse(&tuning, &all).unwrap().model.freezes_llm());
    }

    #[test]
    fn keys_that_the_published_code_has_are_read_as_it_reads_them() {
        let with = |entries: &[&str]| {
            let entries: Vec<String> = entries.iter().map(|&entry| entry.to_owned()).collect();
            TrainConfig::parse(&published("pretrain_I8M"), &entries)
        };
        let config =
            with(&["model.lora.layers=all", "model.vision_attention_mask=default", "model.skip_aux_cls=true"]).unwrap();
        assert_eq!(config.model.lora.as_ref().unwrap().layers, vora_lora::ALL_LAYERS);
        assert_eq!(
            (config.model.vision_attention, config.model.skip_aux_cls),
            (Some(VisionAttention::Causal), Some(true))
        );
        assert_eq!(TrainConfig::parse(&config.to_yaml().unwrap(), &[]).unwrap(), config);
        // An empty name is none, and without a teacher nothing starts from one.
        let config = with(&["model.aux_vision=''", "model.pretrained=''"]).unwrap();
        assert_eq!((&config.model.aux_vision, &config.model.pretrained), (&None, &None));
        assert!(!config.model.starts_from_teacher());
        let noted = config.without_effect();
        assert!(noted.iter().any(|(key, _)| *key == "model.reuse_aux_vision_embedding_layers"), "{noted:?}");
        // What such a recipe leaves to the released code can be said.
        let config =
            with(&["distill.pairing=output", "model.fuse_adjacent_images=false", "model.pos_embed=interpolate"])
                .unwrap();
        assert_eq!((config.distill.pairing, config.model.fuse_adjacent_images), (Some(Pairing::Output), Some(false)));
        assert_eq!(config.model.pos_embed, Some(PositionTable::Interpolated));
        // Other runs are ours.
        let config = set(&[]).unwrap();
        assert_eq!((config.distill.pairing, config.model.fuse_adjacent_images), (Some(Pairing::Output), None));
        fails(with(&["model.skip_aux_cls=true", "model.aux_vision=''"]), &["model.skip_aux_cls is true"]);
        fails(with(&["model.lora.layers=most"]), &["`layers` is neither a number of layers nor `all`"]);
        fails(set(&["model.lora.r=-1"]), &["model.lora.r is below 0", "model.pretrained names no model"]);
        let step = "data.train.data_preprocess.frames_ops={RandomCrop: {size: 3}, HFImageTransform: {path: x}}";
        fails(with(&[step]), &["unknown field `RandomCrop`, expected `PILExpand2Square` or `HFImageTransform`"]);
        let ops = |ops: &str| {
            let config = with(&[&format!("data.train.data_preprocess.frames_ops={ops}")]).unwrap();
            let ops = config.data.train.data_preprocess.unwrap().frames_ops.unwrap();
            (ops.path().to_owned(), ops.background_color())
        };
        assert_eq!(ops("some/model"), ("some/model".to_owned(), None));
        let colored = "{PILExpand2Square: {background_color: [1, 2, 3]}, HFImageTransform: {path: x}}";
        assert_eq!(ops(colored), ("x".to_owned(), Some([1, 2, 3])));
    }

    #[test]
    fn a_resolved_file_is_the_same_run() {
        for text in RECIPES.map(published).into_iter().chain([SMALL.to_owned()]) {
            let config = TrainConfig::parse(&text, &[]).unwrap();
            let yaml = config.to_yaml().unwrap();
            assert_eq!(TrainConfig::parse(&yaml, &[]).unwrap(), config, "{yaml}");
        }
    }

    #[test]
    fn every_recipe_is_a_run() {
        for entry in std::fs::read_dir(recipes()).unwrap() {
            let config = TrainConfig::open(&entry.unwrap().path(), &[]).unwrap();
            assert!(config.without_effect().iter().all(|(key, _)| *key == "distill"));
        }
    }

    #[test]
    fn the_recipes_that_are_compared_differ_in_their_models_alone() {
        let open = |name: &str| TrainConfig::open(&recipes().join(name), &[]).unwrap();
        // An anchor holds adapters on an LLM that is frozen: a Chameleon has none. Its gradient, of the same norm, is spread over
        // twenty times as many elements.
        let of_chameleon = ["adam_epsilon", "output_dir", "run_name", "text_anchor"];
        for (other, expected) in [("scenes-llava.yaml", &of_chameleon[1..3]), ("scenes-chameleon.yaml", &of_chameleon)]
        {
            let differences = open("scenes.yaml").differences(&open(other)).unwrap();
            let keys: Vec<&str> =
                differences.iter().map(|d| d.key.as_str()).filter(|key| !key.starts_with("model.")).collect();
            assert_eq!(keys, expected, "{other}");
        }
    }

    #[test]
    fn wrong_keys_are_refused_with_line_and_column() {
        fails(
            TrainConfig::parse(&SMALL.replace("    r: 4", "    rank: 4"), &[]),
            &["unknown field `rank`", "expected one of layers, r", "line 9", "column 5"],
        );
        fails(
            TrainConfig::parse(&SMALL.replace("    r: 4", "    r: 4\n    r: 5"), &[]),
            &["`r` is there twice", "line 10"],
        );
        fails(TrainConfig::parse(&SMALL.replace("  llm: somewhere\n", ""), &[]), &["missing field `llm`"]);
        fails(TrainConfig::parse(&SMALL.replace("r: 4", "r: four"), &[]), &["line 9", "column 8"]);
        for rate in [".inf", ".nan", "-.inf"] {
            let text = format!("{SMALL}learning_rate: {rate}\n");
            for overrides in [vec![], vec!["seed=1".to_owned()]] {
                let said = [&format!("`{rate}` is not a finite number"), "line 13", "learning_rate: "];
                fails(TrainConfig::parse(&text, &overrides), &said);
            }
            fails(set(&[&format!("learning_rate={rate}")]), &["--set learning_rate=", "is not a finite number"]);
        }
        fails(TrainConfig::parse("output_dir: [", &[]), &["line 1"]);
        fails(TrainConfig::open(Path::new("nope/run.yaml"), &[]), &["cannot read nope/run.yaml", "--config"]);
    }

    #[test]
    fn overrides_reach_into_the_tree() {
        let config = set(&[
            "model.lora.r=64",
            "learning_rate=2e-3",
            "bf16=True",
            "lr_scheduler_type=cosine",
            "learning_rates.lora_B=0.5",
            "data.eval={test: {split: test, samples: 7}}",
            "model.vision_attention=causal",
            "save_strategy=no",
        ])
        .unwrap();
        let r = config.model.lora.as_ref().unwrap().r;
        assert_eq!((r, config.learning_rate, config.bf16), (64, 2e-3, Some(true)));
        assert_eq!((config.lr_scheduler_type, config.learning_rates.0["lora_B"]), (Curve::Cosine, 0.5));
        assert_eq!(config.data.eval["test"].samples, 7);
        assert_eq!(
            (config.model.vision_attention, config.save_strategy),
            (Some(VisionAttention::Causal), Strategy::No)
        );
        let list = ["data.train.data_fetch.data_paths.2.image_folder=pictures".to_owned()];
        let config = TrainConfig::parse(&published("pretrain_I30M_T6M"), &list).unwrap();
        assert_eq!(config.data.train.data_fetch.unwrap().data_paths[2].image_folder, Path::new("pictures"));
    }

    #[test]
    fn a_name_may_be_written_as_a_number() {
        for name in ["2024", "1.50", "true"] {
            let text = SMALL.replace("runs/x", name).replace("max_steps", &format!("run_name: {name}\nmax_steps"));
            for overrides in [vec![], vec!["seed=1".to_owned()]] {
                let config = TrainConfig::parse(&text, &overrides).unwrap();
                assert_eq!((config.run_name.as_deref(), &config.output_dir), (Some(name), &PathBuf::from(name)));
            }
            let entries = [&format!("run_name={name}"), &format!("model.llm={name}"), "seed=7"];
            let config = set(&entries).unwrap();
            assert_eq!((config.run_name.as_deref(), config.model.llm.as_str(), config.seed), (Some(name), name, 7));
        }
        // A number where there is no text stays one.
        fails(set(&["save_strategy=5"]), &["--set save_strategy=5: invalid type: integer `5`"]);
    }

    #[test]
    fn a_key_of_two_names_is_one_key() {
        let small = SMALL.replace("max_steps: 10", "max_steps: 10\nevaluation_strategy: steps");
        let small = small.replace("  llm:", "  vision_attention_mask: causal\n  llm:");
        let set = |entries: &[&str]| {
            let entries: Vec<String> = entries.iter().map(|&entry| entry.to_owned()).collect();
            TrainConfig::parse(&small, &entries)
        };
        let of = |config: &TrainConfig| (config.evaluation_strategy, config.model.vision_attention);
        let (causal, both) = (Some(VisionAttention::Causal), Some(VisionAttention::Bidirectional));
        assert_eq!(of(&set(&[]).unwrap()), (Strategy::Steps, causal));
        for names in [["eval_strategy", "vision_attention"], ["evaluation_strategy", "vision_attention_mask"]] {
            let [strategy, attention] = [format!("{}=no", names[0]), format!("model.{}=bidirectional", names[1])];
            assert_eq!(of(&set(&[&strategy, &attention]).unwrap()), (Strategy::No, both), "{names:?}");
        }
        let last = set(&["eval_strategy=no", "evaluation_strategy=steps", "eval_strategy=no"]).unwrap();
        assert_eq!(last.evaluation_strategy, Strategy::No);
        // In the file itself it is a mistake, which no override hides.
        let twice = small.replace("max_steps: 10", "max_steps: 10\neval_strategy: no");
        for entries in [vec![], vec!["seed=1".to_owned()], vec!["eval_strategy=no".to_owned()]] {
            let said = ["`evaluation_strategy` and `eval_strategy` are two names of one key"];
            fails(TrainConfig::parse(&twice, &entries), &said);
        }
        let twice = small.replace("  llm:", "  vision_attention: causal\n  llm:");
        fails(TrainConfig::parse(&twice, &[]), &["`model.vision_attention` and `model.vision_attention_mask` are"]);
    }

    #[test]
    fn the_weight_of_distillation_goes_its_way() {
        let weights = |schedule: &str| {
            let entry = format!("distill={{weight: 2, blocks: {{0: 3, 1: 1}}, weight_schedule: {schedule}}}");
            let config = set(&[&entry]).unwrap();
            assert_eq!(TrainConfig::parse(&config.to_yaml().unwrap(), &[]).unwrap(), config);
            assert_eq!(config.distill.blocks.as_ref().unwrap()[&0], 3);
            [0, 5, 10, 20].map(|step| (config.distill.weight_at(step, 20) * 1e6).round() / 1e6)
        };
        assert_eq!(weights("null"), [2.0; 4]);
        assert_eq!(weights("{type: linear, end: 0}"), [2.0, 1.5, 1.0, 0.0]);
        assert_eq!(weights("{type: cosine, end: 1, steps: 10}"), [2.0, 1.5, 1.0, 1.0]);
    }

    #[test]
    fn a_wrong_override_is_named() {
        fails(set(&["seed=1", "model.lora.rank=3"]), &["--set model.lora.rank=3: unknown field `rank`"]);
        fails(set(&["max_steps"]), &["--set max_steps: it must be key.key=value"]);
        fails(set(&["max_steps.x=1"]), &["`x` would go into a single value"]);
        fails(set(&["max_steps=[1"]), &["--set max_steps=[1"]);
        // A key that the file lacks can be given, and where it is still lacking the file's own line is told.
        let incomplete = SMALL.replace("output_dir: runs/x\n", "");
        TrainConfig::parse(&incomplete, &["output_dir=runs/y".to_owned()]).unwrap();
        fails(TrainConfig::parse(&incomplete, &["seed=1".to_owned()]), &["missing field `output_dir`"]);
    }

    #[test]
    fn another_model_is_another_model_section() {
        let vora = "{llm: somewhere, patch_size: 14, image_size: 56, lora: {layers: 2, r: 4}}";
        let llava = "{type: llava, llm: somewhere, image_size: 56, vision_tower: elsewhere}";
        let rates = "learning_rates={vision_embedding: 1e-3, multi_modal_projector: 2e-3, lora_B: 3e-3}";
        let rates_of = |model: &str| {
            let config = set(&[&format!("model={model}"), rates, "distill.weight=2"]).unwrap();
            let noted: Vec<&str> = config.without_effect().iter().map(|(key, _)| *key).collect();
            (config.optim().learning_rates.0.into_keys().collect::<Vec<_>>(), noted)
        };
        assert_eq!(rates_of(vora), (vec!["lora_B".to_owned(), "vision_embedding".to_owned()], vec![]));
        assert_eq!(rates_of(llava), (vec!["lora_B".to_owned(), "multi_modal_projector".to_owned()], vec!["distill"]));
    }

    #[test]
    fn differences_name_key_and_both_values() {
        let (a, b) = (set(&[]).unwrap(), set(&["model.lora.r=64", "run_name=other"]).unwrap());
        let found: Vec<String> = a.differences(&b).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(found, ["model.lora.r was 4, is 64", "run_name was absent, is \"other\""]);
        assert!(a.differences(&a).unwrap().is_empty());
    }
}
