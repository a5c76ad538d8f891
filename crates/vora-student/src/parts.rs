//! What of a student is trained, as the parts that lie in a folder.

use std::path::Path;

use anyhow::Result;
use tch::Tensor;
use vora_model::trained::{self, Parts, VISION};
use vora_torch::checkpoint::Checkpoint;

use crate::Student;

/// Everything that a run made or trained.
///
/// # Errors
/// Where memory is short.
pub fn parts_of(student: &Student) -> Result<Parts> {
    if student.is_whole() {
        let heads = student.parameters().into_iter().filter(|(name, _)| name.starts_with("aux_vision."));
        let whole = student.model.tensors()?.into_iter().chain(heads).collect();
        return Ok(Parts::of_whole(whole));
    }
    let made = student.made().iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
    let mut parts = Parts::of(student.parameters(), &*student.model);
    parts.vision.extend(made);
    Ok(parts)
}

/// Reads everything trained from `folder` back into a student made by the same configuration.
///
/// # Errors
/// Where a tensor is missing, has another shape, or is of no use.
pub fn read(student: &Student, folder: &Path) -> Result<()> {
    trained::expect(folder, student.model.peft_config()?.as_ref())?;
    parts_of(student)?.fill_from(folder)
}

/// Starts the vision weights from those that another run trained, in `folder`, its `final/`: LLaVA's second stage from its
/// first.
///
/// # Errors
/// Where a tensor is missing, has another shape, or is of no use.
pub fn start_from(student: &Student, folder: &Path) -> Result<()> {
    let parts = Parts::of(student.parameters(), &*student.model);
    Parts::of_vision(parts.vision).fill_from(folder)
}

/// The teacher's heads in a folder of a run, by their names there; a model that was merged has none.
///
/// # Errors
/// Where the folder cannot be read.
pub fn heads(folder: &Path) -> Result<Vec<(String, Tensor)>> {
    let path = if trained::is_whole(folder) { folder.to_owned() } else { folder.join(VISION) };
    let checkpoint = Checkpoint::open(&path)?;
    let names = checkpoint.names().filter(|name| name.starts_with("aux_vision."));
    names.map(|name| Ok((name.to_owned(), checkpoint.tensor(name)?))).collect()
}
