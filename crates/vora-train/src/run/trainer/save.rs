//! A checkpoint of the run as it is.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use tch::Tensor;
use vora_files::{checksums, write_bytes};
use vora_run::checkpoint::{Keep, Share};
use vora_torch::checkpoint::save;

use super::files::{CONFIG, EMA, OPTIMIZER, OPTIMIZER_SHARES, TEACHER_MEAN, optimizer_share};
use super::trainer::Trainer;
use crate::run::progress::Progress;
use crate::run::snapshot::{Snapshot, on_host};
use crate::run::state::TrainerState;

const RANDOM: &str = "scenes: ChaCha8 of (seed, split, index); order: Feistel network of SplitMix64; new weights: by seed and name; \
     dropout: libtorch's generator by (seed, step, micro-batch, layer)";

/// What rank 0 writes: all but the optimizer's state, copied to the host.
struct Whole {
    snapshot: Snapshot,
    ema: Option<Vec<(String, Tensor)>>,
    mean: Option<Vec<(String, Tensor)>>,
    yaml: String,
    state: TrainerState,
}

impl Whole {
    fn write(&self, folder: &Path) -> Result<()> {
        self.snapshot.write(folder)?;
        if let Some(ema) = &self.ema {
            save(&folder.join(EMA), ema, &[])?;
        }
        if let Some(mean) = &self.mean {
            save(&folder.join(TEACHER_MEAN), mean, &[])?;
        }
        write_bytes(&folder.join(CONFIG), self.yaml.as_bytes())?;
        self.state.save(folder)
    }
}

impl Trainer {
    /// Copies all that a checkpoint holds, begins to write it, and draws the plot anew. A save that is still being written is
    /// waited for. Of several processes that share the optimizer's state each writes what it has of it, and rank 0 the rest;
    /// else rank 0 writes everything.
    pub(super) fn begin_save(&mut self, progress: &mut dyn Progress) -> Result<()> {
        self.wait_for_save(progress)?;
        let (rank, world_size) = (self.ranks.rank(), self.ranks.world_size());
        let is_shared = world_size > 1 && self.config.zero_stage > 0;
        let keep = Keep { newest: self.config.save_total_limit, best: self.best.map(|best| best.step) };
        let whole = self.ranks.first(|| self.whole())?;
        if is_shared {
            let begun = self.ranks.first(|| self.run.begin_shared(self.step));
            self.ranks.agree(begun)?;
            // The step counter is the same in all: rank 0 has it.
            let means = self.optimizer.state().into_iter().skip(usize::from(rank > 0));
            let (means, name) = (on_host(means.collect()), optimizer_share(rank, world_size));
            let write = move |folder: &Path| {
                save(&folder.join(&name), &means, &[])?;
                let Some(whole) = whole else { return Ok(vec![name]) };
                whole.write(folder)?;
                names_besides(folder, &name)
            };
            self.share = Some(Share::begin(&self.run, self.step, keep, write)?);
        } else if let Some(whole) = whole {
            let optimizer = on_host(self.optimizer.state());
            self.saver.begin(self.step, keep, move |folder| {
                save(&folder.join(OPTIMIZER), &optimizer, &[])?;
                whole.write(folder)
            })?;
        }
        if self.ranks.is_first() { self.plot() } else { Ok(()) }
    }

    /// Tells of a save that has come to its end, and makes a checkpoint of shares that all have written.
    pub(super) fn look_after_save(&mut self, progress: &mut dyn Progress) -> Result<()> {
        if let Some(folder) = self.saver.written()? {
            progress.saved(&folder);
        }
        match &self.share {
            Some(share) if !self.ranks.any(!share.is_written())? => self.end_share(progress),
            _ => Ok(()),
        }
    }

    /// The same, once it is written.
    pub(super) fn wait_for_save(&mut self, progress: &mut dyn Progress) -> Result<()> {
        if let Some(folder) = self.saver.wait()? {
            progress.saved(&folder);
        }
        self.end_share(progress)
    }

    /// Waits for the shares of all processes; rank 0 makes a checkpoint of them.
    fn end_share(&mut self, progress: &mut dyn Progress) -> Result<()> {
        let Some(share) = self.share.take() else { return Ok(()) };
        let (step, keep) = (share.step, share.keep);
        let own = self.ranks.agree(share.written())?;
        let mut digests = BTreeMap::new();
        for theirs in self.ranks.gather(serde_json::to_vec(&own)?)? {
            digests.extend(serde_json::from_slice::<BTreeMap<String, String>>(&theirs)?);
        }
        if let Some(folder) = self.ranks.first(|| self.run.end_shared(step, keep, &digests))? {
            progress.saved(&folder);
        }
        Ok(())
    }

    fn whole(&self) -> Result<Whole> {
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
        Ok(Whole {
            snapshot: Snapshot::of(&self.student)?,
            ema: self.ema.as_ref().map(|ema| on_host(ema.state())),
            mean: self.student.distill.as_ref().and_then(|d| d.mean()).map(|mean| on_host(mean.state())),
            yaml,
            state,
        })
    }
}

/// The files in a checkpoint but for the shares of other processes than the one that wrote `own`.
fn names_besides(folder: &Path, own: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name == own || !(name.starts_with(OPTIMIZER_SHARES) || name.starts_with(".tmp-")) {
            names.push(name);
        }
    }
    Ok(names)
}
