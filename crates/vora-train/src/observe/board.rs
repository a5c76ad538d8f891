//! What a run shows in TensorBoard, by which tags.

use std::path::Path;

use anyhow::Result;
use vora_image::ImageProcessor;

use crate::observe::block_maps::BlockMaps;
use crate::observe::samples::Shown;
use vora_run::metrics::{EvalMetrics, Line, MetricsLog, StepMetrics};
use vora_run::tensorboard::EventWriter;

/// The event file of a run in training.
#[derive(Debug)]
pub(crate) struct Board {
    events: EventWriter,
}

impl Board {
    /// Opens the board of a run that goes on after `step`, whose `metrics.jsonl` is cut to it already.
    pub(crate) fn open(run: &Path, step: u64) -> Result<Self> {
        let mut this = Self { events: EventWriter::open(run, step)? };
        // The checkpoint's own step is taken back as well, for the evaluation that followed it is made again.
        for line in MetricsLog::read(&run.join("metrics.jsonl"))? {
            if let Line::Step(metrics) = line
                && metrics.step == step
            {
                this.step(&metrics)?;
            }
        }
        Ok(this)
    }

    /// The numbers of a step.
    pub(crate) fn step(&mut self, metrics: &StepMetrics) -> Result<()> {
        let mut values = vec![("train/loss".to_owned(), metrics.loss), ("train/loss_lm".to_owned(), metrics.loss_lm)];
        let optional = [
            ("train/loss_distill", metrics.loss_distill),
            ("train/distill_weight", metrics.distill_weight),
            ("train/baseline_distill", metrics.baseline_distill),
            ("train/loss_anchor", metrics.loss_anchor),
            ("train/rewards/chosen", metrics.rewards.map(|rewards| rewards.chosen)),
            ("train/rewards/rejected", metrics.rewards.map(|rewards| rewards.rejected)),
            ("train/rewards/accuracies", metrics.rewards.map(|rewards| rewards.accuracies)),
            ("train/rewards/margins", metrics.rewards.map(|rewards| rewards.margins)),
            ("system/memory", metrics.memory.map(|bytes| bytes as f64)),
        ];
        values.extend(optional.into_iter().filter_map(|(tag, value)| Some((tag.to_owned(), value?))));
        let blocks = metrics.distill_blocks.iter().enumerate();
        values.extend(blocks.map(|(block, loss)| (format!("distill/block_{block:02}"), *loss)));
        let always = [
            ("train/learning_rate", metrics.lr),
            ("train/grad_norm", metrics.grad_norm),
            ("train/tokens_per_second", metrics.tokens_per_second),
            ("train/samples_per_second", metrics.samples_per_second),
            ("train/data_wait", metrics.data_wait),
            ("train/padding_share", metrics.padding_share),
            ("data/truncated", metrics.truncated as f64),
            ("data/too_long", metrics.too_long as f64),
        ];
        values.extend(always.map(|(tag, value)| (tag.to_owned(), value)));
        self.events.scalars(metrics.step, &values)
    }

    /// The numbers of an evaluation: every number of the report, by split, question type and, beside exact match, its own name.
    pub(crate) fn eval(&mut self, metrics: &EvalMetrics) -> Result<()> {
        let mut values = Vec::new();
        for (split, kinds) in &metrics.eval.0 {
            for (kind, score) in kinds {
                values.push((format!("eval/{split}/{kind}"), score.exact_match));
                values.extend(score.blind_exact_match.map(|blind| (format!("eval/{split}/{kind}/blind"), blind)));
            }
        }
        self.events.scalars(metrics.step, &values)
    }

    /// Held-out pictures, and the question, the answer and the right one about each.
    pub(crate) fn samples(
        &mut self,
        step: u64,
        shown: &[Shown],
        answers: &[String],
        processor: &ImageProcessor,
    ) -> Result<()> {
        for (shown, answer) in shown.iter().zip(answers) {
            let tag = format!("samples/{}", shown.name);
            let question = shown.question();
            let text = format!(
                "| | |\n|---|---|\n| question | {} |\n| answer | {} |\n| expected | {} |",
                in_table(&question.question),
                in_table(answer),
                in_table(&question.answer)
            );
            self.events.image(step, &tag, &shown.seen(processor))?;
            self.events.text(step, &format!("{tag}/answer"), &text)?;
        }
        Ok(())
    }

    /// The picture of all blocks, and what is in it.
    pub(crate) fn block_maps(&mut self, step: u64, maps: &BlockMaps) -> Result<()> {
        self.events.image(step, "block_maps", &maps.image())?;
        let layout = maps.layout();
        let blocks = layout.pictures.first().map_or(0, |picture| picture.cosines.len());
        let header: String = (0..blocks).map(|block| format!(" {block} |")).collect();
        let mut text = format!(
            "Each picture, the teacher's features block by block, and below them the student's, in the colours of the \
             teacher's first three principal components. The cosine of the two:\n\n| block |{header}\n|---|{}",
            "---|".repeat(blocks)
        );
        for picture in &layout.pictures {
            let cosines: String = picture.cosines.iter().map(|cosine| format!(" {cosine:.2} |")).collect();
            text += &format!("\n| {} |{cosines}", in_table(&picture.name));
        }
        self.events.text(step, "block_maps/cosine", &text)
    }
}

/// A text as it can stand in a cell of a Markdown table.
fn in_table(text: &str) -> String {
    text.replace('\\', "\\\\").replace('|', "\\|").replace(['\n', '\r'], " ")
}
