//! What the types of a run file leave open: values that make no run, and keys that change nothing.

use anyhow::{Context, Result, ensure};
use vora_lora::ActsOn;

use crate::distill::{DistillConfig, Pairing};
use crate::loss::{BETA, Loss};
use crate::model::ModelType;
use crate::optim::OptimConfig;
use crate::run::{Strategy, TrainConfig, split_of};

impl TrainConfig {
    /// Checks what the types leave open.
    ///
    /// # Errors
    /// Names the key.
    pub fn validate(&self) -> Result<()> {
        ensure!(!self.output_dir.as_os_str().is_empty(), "output_dir is empty, it takes the folder of the run");
        let at_least_one = [
            ("per_device_train_batch_size", self.per_device_train_batch_size as i64),
            ("per_device_eval_batch_size", self.per_device_eval_batch_size as i64),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps as i64),
            ("dataloader_num_workers", self.dataloader_num_workers as i64),
            ("logging_steps", self.logging_steps as i64),
            ("save_steps", self.save_steps as i64),
            ("save_total_limit", self.save_total_limit as i64),
            ("eval_steps", self.eval_steps as i64),
            ("ddp_timeout", self.ddp_timeout as i64),
        ];
        for (key, value) in at_least_one {
            ensure!(value >= 1, "{key} is {value}, it must be at least 1");
        }
        // What is made at once: more of it ends in memory that there is not.
        for (key, value, most) in [
            ("per_device_train_batch_size", self.per_device_train_batch_size, 65_536),
            ("per_device_eval_batch_size", self.per_device_eval_batch_size, 65_536),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps, 65_536),
            ("dataloader_num_workers", self.dataloader_num_workers, 1024),
        ] {
            ensure!(value <= most, "{key} is {value}, it must be {most} or less");
        }
        self.validate_zero_stage()?;
        // Those of parts that only another type of model has, too.
        OptimConfig { learning_rates: self.learning_rates.clone(), ..self.optim() }.validate()?;
        let epochs = self.num_train_epochs;
        ensure!(epochs >= 0.0 && epochs.is_finite(), "num_train_epochs is {epochs}, it must be 0 or more");
        let ema_decay = self.ema_decay.unwrap_or(0.0);
        for (key, value) in [("warmup_ratio", self.warmup_ratio), ("ema_decay", ema_decay)] {
            ensure!((0.0..1.0).contains(&value), "{key} is {value}, it must be at least 0 and below 1");
        }
        self.lr_scheduler_kwargs.validate(self.lr_scheduler_type)?;
        ensure!(!(self.fp16 && self.bf16 == Some(true)), "bf16 and fp16 are both true, a run computes in one of them");
        self.distill.validate()?;
        ensure!(
            self.max_steps == -1 || self.max_steps > 0,
            "max_steps is {}, it must be at least 1, or -1 to leave it to num_train_epochs",
            self.max_steps
        );
        self.validate_best()?;
        self.model.validate()?;
        self.data.validate(&self.model)?;
        self.validate_loss()?;
        self.validate_anchor()?;
        ensure!(
            self.max_steps > 0 || self.data.train.scenes.is_none(),
            "max_steps is -1, but scenes never end: say how many steps"
        );
        ensure!(
            self.max_steps > 0 || !self.data.train.packing,
            "max_steps is -1, but with data.train.packing it shows only on the way how many samples a step takes: say \
             how many steps"
        );
        Ok(())
    }

    /// Weights that are shared out are frozen, plain, and needed block by block.
    fn validate_zero_stage(&self) -> Result<()> {
        let (stage, model) = (self.zero_stage, &self.model);
        ensure!([0, 1, 3].contains(&stage), "zero_stage is {stage}, 0, 1 and 3 are supported");
        if stage < 3 {
            return Ok(());
        }
        ensure!(
            self.gradient_checkpointing,
            "zero_stage is 3, which gathers a block's weights while it computes: set gradient_checkpointing=true, without \
             which the way back would keep those of all blocks"
        );
        ensure!(
            model.freezes_llm() && model.model_type != ModelType::Chameleon,
            "zero_stage is 3, which shares out the LLM's frozen weights, and this run trains all of them: take 1"
        );
        let few_bits = model.few_bits_key();
        ensure!(
            few_bits.is_none(),
            "zero_stage is 3, which shares out plain weights, and {} keeps them in few bits: take one of the two",
            few_bits.unwrap_or_default()
        );
        Ok(())
    }

    /// DPO compares adapters with what is there without them.
    fn validate_loss(&self) -> Result<()> {
        if self.loss != Loss::Dpo {
            ensure!(self.beta.is_none(), "beta is DPO's, but `loss: dpo` is not set");
            return Ok(());
        }
        let beta = self.beta.unwrap_or(BETA);
        ensure!(beta > 0.0 && beta.is_finite(), "beta is {beta}, it must be above 0");
        let sees_alike = self.model.vision_lora.is_none() && !self.model.trains_vision_tower();
        ensure!(
            sees_alike,
            "loss is dpo, whose reference sees through the encoder as it was: leave out model.vision_lora and model.train"
        );
        ensure!(
            self.model.adapters().is_some(),
            "loss is dpo, whose reference is the model with its adapters off, but model.lora attaches none"
        );
        Ok(())
    }

    /// An anchor holds adapters, which its texts must reach.
    fn validate_anchor(&self) -> Result<()> {
        let Some(anchor) = &self.text_anchor else { return Ok(()) };
        anchor.validate()?;
        let lora = self.model.adapters().context(
            "text_anchor holds adapters to the LLM that they are on, but model.lora attaches none: the LLM is either \
             untouched, or trained whole and nothing of what it was is left",
        )?;
        ensure!(
            lora.acts_on == ActsOn::All,
            "text_anchor: the adapters act on `{}`, and the anchor's texts have no picture: they would train nothing, nor \
             is there anything to keep",
            lora.acts_on
        );
        Ok(())
    }

    /// A best checkpoint needs evaluations of checkpoints.
    fn validate_best(&self) -> Result<()> {
        ensure!(
            !self.load_best_model_at_end || self.ema_decay.is_none(),
            "load_best_model_at_end and ema_decay are both set: the averaged weights are evaluated, and only those of the \
             last step are known at the end"
        );
        let Some(metric) = &self.metric_for_best_model else {
            ensure!(
                !self.load_best_model_at_end,
                "load_best_model_at_end is true, but metric_for_best_model does not say what is best"
            );
            return Ok(());
        };
        ensure!(
            split_of(metric).is_some_and(|split| self.data.eval.contains_key(split)),
            "metric_for_best_model is {metric}, it must be eval_SPLIT_exact_match, SPLIT being one of data.eval: {}",
            self.data.eval.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
        );
        ensure!(
            [self.save_strategy, self.evaluation_strategy] == [Strategy::Steps; 2]
                && self.save_steps.is_multiple_of(self.eval_steps),
            "metric_for_best_model needs an evaluation of each checkpoint: save_strategy and evaluation_strategy must \
             be steps, and save_steps ({}) a multiple of eval_steps ({})",
            self.save_steps,
            self.eval_steps
        );
        Ok(())
    }

    /// Keys that the file gives and that change nothing here, with the reason.
    pub fn without_effect(&self) -> Vec<(&'static str, &'static str)> {
        let preprocess = self.data.train.data_preprocess.as_ref();
        let all = [
            ("tf32", self.tf32.is_some(), "matrix products run in the dtype of the weights"),
            (
                "distill.cache",
                self.distill.cache.is_some() && self.data.train.scenes.is_some(),
                "scenes never end, and none comes twice",
            ),
            (
                "report_to",
                self.report_to.as_deref().is_some_and(|to| !["none", "all", "tensorboard"].contains(&to)),
                "TensorBoard's event files are written; none leaves them out",
            ),
            (
                "greater_is_better",
                self.greater_is_better.is_some() && self.metric_for_best_model.is_none(),
                "metric_for_best_model does not say of what",
            ),
            ("wandb_project", self.wandb_project.is_some(), "metrics go to metrics.jsonl"),
            ("deepspeed", self.deepspeed.is_some(), "zero_stage says what processes share"),
            ("data_preprocess.tokenizer", preprocess.is_some_and(|p| p.tokenizer.is_some()), "the LLM's own is used"),
            (
                "data_preprocess.max_prompt_len",
                preprocess.is_some_and(|p| p.max_prompt_len.is_some()),
                "max_seq_len is the limit",
            ),
            (
                "data_preprocess.vqa_processor_params",
                preprocess.is_some_and(|p| p.vqa_processor_params.is_some()) && self.model.chat_template.is_some(),
                "model.chat_template is used",
            ),
            (
                "model.reuse_aux_vision_embedding_layers",
                self.model.reuse_aux_vision_embedding_layers.is_some() && self.model.aux_vision.is_none(),
                "model.aux_vision names no teacher",
            ),
            (
                "data_preprocess.num_segments",
                preprocess.is_some_and(|p| p.num_segments.is_some_and(|n| n != 1)),
                "each frame is a picture",
            ),
            (
                "distill",
                !matches!(self.model.model_type, ModelType::Vora | ModelType::Gemma4Unified | ModelType::Own)
                    && self.distill != DistillConfig { pairing: Some(Pairing::Output), ..DistillConfig::default() },
                "only a VoRA and a Gemma 4 Unified have a teacher",
            ),
        ];
        let kwargs = self.lr_scheduler_kwargs.without_effect(self.lr_scheduler_type);
        let kwargs = kwargs.into_iter().map(|key| (key, "this lr_scheduler_type does not read it"));
        all.into_iter().filter(|(_, given, _)| *given).map(|(key, _, reason)| (key, reason)).chain(kwargs).collect()
    }
}

#[cfg(test)]
mod tests {
    use vora_data::scenes::ScenesConfig;
    use vora_lora::LoraConfig;

    use super::*;
    use crate::data::{DataConfig, EvalData, TrainData};
    use crate::model::ModelConfig;
    use crate::run::tests::{fails, set};

    #[test]
    fn values_out_of_range_name_their_key() {
        let cases: [(&str, &str); 27] = [
            (
                "per_device_train_batch_size=99999999999",
                "per_device_train_batch_size is 99999999999, it must be 65536 or",
            ),
            ("per_device_eval_batch_size=65537", "per_device_eval_batch_size is 65537, it must be 65536 or less"),
            ("gradient_accumulation_steps=1000000", "gradient_accumulation_steps is 1000000, it must be"),
            ("dataloader_num_workers=100000", "dataloader_num_workers is 100000, it must be 1024 or less"),
            ("model.lora.r=0", "model.lora.r is 0, it must be at least 1"),
            ("model.image_size=50", "model.image_size is 50, it must be a multiple of model.patch_size, 14"),
            ("model.vision_embedding=CLIP", "model.vision_embedding=CLIP"),
            ("model.background_color=[1, 2]", "background_color"),
            ("data.train.scenes.image_size=84", "data.train.scenes.image_size is 84, model.image_size is 56"),
            ("data.train.scenes=null", "data.train has neither `scenes` nor `data_fetch`"),
            ("max_steps=-1", "scenes never end"),
            ("max_steps=0", "max_steps is 0"),
            ("learning_rate=-1", "learning_rate is -1, it must be 0 or more"),
            ("adam_beta2=1", "adam_beta2 is 1, it must be at least 0 and below 1"),
            ("lr_scheduler_type=warmup_stable_decay", "lr_scheduler_kwargs.num_decay_steps is missing"),
            ("lr_scheduler_kwargs.decay_type=sqrt", "unknown variant `sqrt`"),
            ("ema_decay=1", "ema_decay is 1, it must be at least 0 and below 1"),
            ("distill.blocks={}", "distill.blocks is empty"),
            ("distill.weight_schedule={type: linear, end: -1}", "distill.weight_schedule.end is -1"),
            ("zero_stage=2", "zero_stage is 2, 0, 1 and 3 are supported"),
            (
                "zero_stage=3",
                "zero_stage is 3, which gathers a block's weights while it computes: set gradient_checkpointing",
            ),
            ("save_steps=0", "save_steps is 0, it must be at least 1"),
            ("data.eval.test.samples=3", "data.eval.test must have one of `split`"),
            ("data.eval={../a: {split: test}}", "data.eval has a split `../a`: names of files"),
            ("data.eval={test: {split: test, questions_per_image: 0}}", "data.eval.test.questions_per_image is 0"),
            (
                "data.eval={one: {split: test, objects: [0, 0, 0]}}",
                "data.eval.one.objects is [0.0, 0.0, 0.0], it must hold",
            ),
            ("data.eval={one: {split: test, kinds: {colour: 1}}}", "data.eval.one.kinds asks nothing"),
        ];
        for (entry, expected) in cases {
            fails(set(&[entry]), &[expected]);
        }
    }

    #[test]
    fn weights_are_shared_out_where_they_are_frozen_and_plain() {
        let shared = ["zero_stage=3", "gradient_checkpointing=true"];
        assert!(set(&shared).is_ok());
        for (more, expected) in [
            ("model.load_in_4bit=true", "shares out plain weights, and model.load_in_4bit keeps them in few bits"),
            ("model.freeze_llm=false", "this run trains all of them: take 1"),
        ] {
            let lora = if more.contains("freeze") { "model.lora=null" } else { "model.lora.r=4" };
            fails(set(&[&shared[..], &[more, lora]].concat()), &[expected]);
        }
    }

    /// A config that is made in code is one that a file would have made, and is refused by the same words.
    #[test]
    fn a_config_made_in_code_is_checked_as_a_file_is() {
        let from_file = set(&[]).unwrap();
        let made = || TrainConfig {
            output_dir: "runs/x".into(),
            max_steps: 10,
            model: ModelConfig {
                llm: "somewhere".to_owned(),
                patch_size: Some(14),
                image_size: 56,
                lora: Some(LoraConfig::new(4, 2)),
                ..ModelConfig::default()
            },
            data: DataConfig {
                train: TrainData { scenes: Some(ScenesConfig::default()), ..TrainData::default() },
                ..DataConfig::default()
            },
            ..TrainConfig::default()
        };
        assert_eq!(made().checked().unwrap(), from_file);
        fails(
            TrainConfig { adam_beta2: 1.0, ..made() }.checked(),
            &["adam_beta2 is 1, it must be at least 0 and below 1"],
        );
        fails(TrainConfig { output_dir: "".into(), ..made() }.checked(), &["output_dir is empty"]);
        fails(TrainConfig { model: ModelConfig::default(), ..made() }.checked(), &["model.llm is empty"]);
        fails(
            TrainConfig { data: DataConfig::default(), ..made() }.checked(),
            &["data.train has neither `scenes` nor"],
        );
        let split = EvalData { samples: 0, ..EvalData::default() };
        let data = DataConfig { eval: [("test".to_owned(), split)].into(), ..made().data };
        fails(TrainConfig { data, ..made() }.checked(), &["data.eval.test.samples is 0"]);
    }

    #[test]
    fn data_of_a_programs_own_stand_alone() {
        let own = "data={train: {source: mine}, eval: {held: {source: mine, samples: 3}}}";
        let config = set(&[own]).unwrap();
        assert_eq!(TrainConfig::parse(&config.to_yaml().unwrap(), &[]).unwrap(), config);
        fails(set(&["data={train: {source: mine, scenes: {}}}"]), &["`scenes` or `data_fetch` beside it"]);
        let both = "data={train: {source: mine}, eval: {held: {source: mine, split: test}}}";
        fails(set(&[both]), &["data.eval.held has a `source` of a program's own"]);
    }

    #[test]
    fn a_run_computes_in_one_kind() {
        assert!(set(&["fp16=true", "bf16=false"]).unwrap().fp16);
        fails(set(&["fp16=true", "bf16=true"]), &["bf16 and fp16 are both true"]);
    }

    #[test]
    fn a_best_checkpoint_needs_evaluations_of_checkpoints() {
        let with = |lines: &str| {
            let eval = "\ndata: { train: { scenes: { image_size: 56 } }, eval: { test: { split: test } } }";
            let model = "\nmodel: { llm: x, patch_size: 14, image_size: 56, lora: { layers: 1, r: 1 } }";
            TrainConfig::parse(&format!("output_dir: x\nmax_steps: 1\n{lines}{eval}{model}"), &[])
        };
        let metric = "metric_for_best_model: eval_test_exact_match\n";
        let steps = "evaluation_strategy: steps\neval_steps: 50\nsave_steps: 100\n";
        assert!(with(&format!("{metric}{steps}load_best_model_at_end: true")).is_ok());
        fails(with(&format!("{metric}save_steps: 100")), &["needs an evaluation of each checkpoint"]);
        fails(
            with(&format!("{metric}{steps}").replace("save_steps: 100", "save_steps: 75")),
            &["save_steps (75) a multiple of eval_steps (50)"],
        );
        fails(
            with(&format!("{metric}{steps}load_best_model_at_end: true\nema_decay: 0.9")),
            &["load_best_model_at_end and ema_decay are both set"],
        );
        fails(with("load_best_model_at_end: true"), &["metric_for_best_model does not say what is best"]);
        for wrong in ["metric_for_best_model: eval_other_exact_match", "metric_for_best_model: loss"] {
            fails(with(&format!("{wrong}\n{steps}")), &["one of data.eval: test"]);
        }
        let config = with("greater_is_better: true").unwrap();
        assert!(config.without_effect().iter().any(|(key, _)| *key == "greater_is_better"));
    }
}
