//! A checkpoint of the run as it is.

use anyhow::Result;
use vora_files::write_bytes;
use vora_torch::checkpoint::save;

use super::files::{CONFIG, EMA, OPTIMIZER, TEACHER_MEAN};
use super::trainer::Trainer;
use crate::run::progress::Progress;
use crate::run::snapshot::{Snapshot, on_host};
use crate::run::state::TrainerState;
use vora_files::checksums;
use vora_run::checkpoint::Keep;

const RANDOM: &str = "scenes: ChaCha8 of (seed, split, index); order: Feistel network of SplitMix64; new weights: by seed and name; \
     dropout: libtorch's generator by (seed, step, micro-batch, layer)";

impl Trainer {
    /// Copies all that a checkpoint holds to rank 0, begins to write it there, and draws the plot anew. A save that is still being
    /// written is waited for.
    pub(super) fn begin_save(&mut self, progress: &mut dyn Progress) -> Result<()> {
        self.wait_for_save(progress)?;
        let optimizer = match self.config.zero_stage {
            0 => self.optimizer.state(),
            _ => self.ranks.gather_state(&self.optimizer)?,
        };
        if !self.ranks.is_first() {
            return Ok(());
        }
        let yaml = self.config.to_yaml()?;
        let state = TrainerState {
            step: self.step,
            samples_seen: self.loader.position(),
            samples_held: self.loader.held(),
            skipped_steps: self.skipped_steps,
            skipped_in_a_row: self.skipped_in_a_row,
            best: self.best,
            seconds: self.seconds,
            loss_scale: self.loss_scale,
            seed: self.config.seed,
            random: RANDOM.to_owned(),
            source_sha256: self.source_sha256.clone(),
            config_sha256: checksums::of(yaml.as_bytes()),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        let snapshot = Snapshot::of(&self.student)?;
        let optimizer = on_host(optimizer);
        let mean = self.student.distill.as_ref().and_then(|d| d.mean()).map(|mean| on_host(mean.state()));
        let ema = self.ema.as_ref().map(|ema| on_host(ema.state()));
        let keep = Keep { newest: self.config.save_total_limit, best: self.best.map(|best| best.step) };
        self.saver.begin(self.step, keep, move |folder| {
            snapshot.write(folder)?;
            save(&folder.join(OPTIMIZER), &optimizer, &[])?;
            if let Some(ema) = ema {
                save(&folder.join(EMA), &ema, &[])?;
            }
            if let Some(mean) = mean {
                save(&folder.join(TEACHER_MEAN), &mean, &[])?;
            }
            write_bytes(&folder.join(CONFIG), yaml.as_bytes())?;
            state.save(folder)
        })?;
        self.plot()
    }
}
