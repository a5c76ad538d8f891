//! Where a run goes on, and what it takes back from there.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use vora_recipe::{Difference, TrainConfig};
use vora_torch::checkpoint::Checkpoint;

use super::files::{CONFIG, EMA, OPTIMIZER, OPTIMIZER_SHARES, TEACHER_MEAN, optimizer_share};
use crate::run::ranks::Ranks;
use crate::run::state::TrainerState;
use crate::step::ema::Ema;
use vora_run::checkpoint::{self, FINAL, RunFolder};
use vora_student::heads::TeacherMean;
use vora_student::{Student, parts};
use vora_torch::optim::Optimizer;

/// Where the run goes on: none for a new one. A folder that already holds a run is not written over by mistake.
fn last_checkpoint(run: &RunFolder, config: &TrainConfig, resume: bool) -> Result<Option<PathBuf>> {
    if !resume {
        if config.overwrite_output_dir {
            return Ok(None); // the old run is cleared once all of the new one has been opened
        }
        if let Some((step, _)) = checkpoint::list(run.path())?.last() {
            bail!(
                "{} already holds a run of {step} steps; go on with --resume, or choose another output_dir, or set \
                 overwrite_output_dir=true",
                run.path().display()
            );
        }
        ensure!(
            !run.has_final(),
            "{} already holds the {FINAL}/ of a run; choose another output_dir, or set overwrite_output_dir=true",
            run.path().display()
        );
        return Ok(None);
    }
    let Some(folder) = checkpoint::latest(run.path())? else {
        ensure!(
            config.overwrite_output_dir || !run.has_final(),
            "{} holds the {FINAL}/ of a run without a checkpoint to go on from: choose another output_dir, or set \
             overwrite_output_dir=true to begin again in its place",
            run.path().display()
        );
        tracing::warn!("{} has no checkpoint: the run begins at its start", run.path().display());
        return Ok(None);
    };
    let text = std::fs::read_to_string(folder.join(CONFIG))?;
    let saved = TrainConfig::parse(&text, &[]).with_context(|| format!("in {}", folder.join(CONFIG).display()))?;
    let differences = saved.differences(config)?;
    ensure!(
        saved.text_anchor.is_some() || config.text_anchor.is_none(),
        "cannot resume from {}: text_anchor is given and was not when the run began, before whose first step its texts are \
         made: leave it out, or begin a new run",
        folder.display()
    );
    let (refused, changed): (Vec<_>, Vec<_>) =
        differences.into_iter().partition(|difference| shapes_the_model(&difference.key));
    let list = |differences: &[Difference]| differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    ensure!(refused.is_empty(), "cannot resume from {}: {}", folder.display(), list(&refused));
    if !changed.is_empty() {
        tracing::warn!("resuming with other settings: {}", list(&changed));
    }
    Ok(Some(folder))
}

/// The same in every process: rank 0 looks for it.
pub(super) fn last_of_all(
    ranks: &Ranks,
    run: &RunFolder,
    config: &TrainConfig,
    resume: bool,
) -> Result<Option<PathBuf>> {
    let mut found = None;
    let name = ranks.of_first(|| {
        found = last_checkpoint(run, config, resume)?;
        let name = found.as_deref().and_then(Path::file_name).unwrap_or_default();
        Ok(name.to_string_lossy().into_owned().into_bytes())
    })?;
    if ranks.is_first() || name.is_empty() {
        return Ok(found);
    }
    let folder = run.path().join("checkpoints").join(String::from_utf8_lossy(&name).into_owned());
    ensure!(
        folder.is_dir(),
        "rank {} sees no checkpoint at {}, from which rank 0 goes on: all processes take the run folder from a file \
         system that they share",
        ranks.rank(),
        folder.display()
    );
    Ok(Some(folder))
}

/// A source of a program's own has to go on with the samples that it began with.
pub(super) fn expect_source(state: Option<&TrainerState>, found: Option<&str>, config: &TrainConfig) -> Result<()> {
    let before = state.and_then(|state| state.source_sha256.as_deref());
    let name = config.data.train.source.as_deref().unwrap_or("data.train");
    ensure!(
        before.is_none() || found.is_none() || before == found,
        "cannot resume: the source `{name}` gives other first samples than when the run began; the same number must give \
         the same sample in every process"
    );
    Ok(())
}

/// Whether another value of this key is another model; where models lie may change.
fn shapes_the_model(key: &str) -> bool {
    let place = ["model.llm", "model.aux_vision", "model.vision_tower", "model.pretrained"].contains(&key);
    (key.starts_with("model.") && !place)
        || ["distill.pairing", "distill.center"].contains(&key)
        || key.starts_with("distill.blocks")
}

/// The optimizer's state in a checkpoint, which one process wrote or several, a share each.
pub(super) fn optimizer_state(folder: &Path) -> Result<Checkpoint> {
    let whole = folder.join(OPTIMIZER);
    if whole.exists() {
        return Checkpoint::open(&whole);
    }
    let has_shares = |world_size: &usize| folder.join(optimizer_share(0, *world_size)).exists();
    let world_size = shares_in(folder)?.into_iter().find(has_shares);
    let world_size = world_size.with_context(|| format!("{} has no {OPTIMIZER}, nor shares", folder.display()))?;
    let files: Vec<PathBuf> = (0..world_size).map(|rank| folder.join(optimizer_share(rank, world_size))).collect();
    Checkpoint::of_files(folder, &files)
}

/// Numbers of processes that a checkpoint has shares of.
fn shares_in(folder: &Path) -> Result<BTreeSet<usize>> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let share = name.strip_prefix(OPTIMIZER_SHARES).and_then(|name| name.strip_suffix(".safetensors"));
        found.extend(share.and_then(|share| share.split_once("-of-")?.1.parse::<usize>().ok()));
    }
    Ok(found)
}

/// Reads weights, their average, optimizer and the teacher's mean from a checkpoint. An average that the checkpoint
/// lacks starts anew.
pub(super) fn restore(
    student: &mut Student,
    optimizer: &mut Optimizer,
    ema: Option<&mut Ema>,
    folder: &Path,
) -> Result<()> {
    let taught = student.distill.is_some() || parts::heads(folder).map_or(true, |heads| heads.is_empty());
    ensure!(
        taught,
        "it has heads of a teacher, and this run has none: model.aux_vision names it, or Student::with_teacher brings one of \
         a program's own again"
    );
    parts::read(student, folder)?;
    optimizer.load_state(&optimizer_state(folder)?)?;
    let averages = folder.join(EMA);
    if let (Some(ema), true) = (ema, averages.exists()) {
        ema.load_state(&Checkpoint::open(&averages)?)?;
    }
    let (device, path) = (student.device(), folder.join(TEACHER_MEAN));
    if let (Some(distill), true) = (&mut student.distill, path.exists()) {
        distill.set_mean(TeacherMean::load(&Checkpoint::open(&path)?, device)?);
    }
    Ok(())
}
