//! The processes of a run: this one alone, or those that it trains with.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use tch::Tensor;
use vora_data::Peers;
use vora_recipe::TrainConfig;
use vora_torch::dist::{Gradients, ProcessGroup};
use vora_torch::optim::{Optimizer, broadcast};

/// The processes of a run. What one of them asks of this, all ask, in the same order; one that trains alone is told what it
/// knows.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ranks(Option<Arc<ProcessGroup>>);

impl Ranks {
    /// Those of `group`; none: this process alone.
    pub(crate) fn new(group: Option<Arc<ProcessGroup>>) -> Self {
        Self(group)
    }

    /// The others with this one; none for one that trains alone.
    pub(crate) fn group(&self) -> Option<&Arc<ProcessGroup>> {
        self.0.as_ref()
    }

    pub(crate) fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |group| group.rank())
    }

    pub(crate) fn world_size(&self) -> usize {
        self.0.as_ref().map_or(1, |group| group.world_size())
    }

    /// Whether this process is the one that writes and tells.
    pub(crate) fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Whether there are others, or a group of this process alone, which goes the ways of several.
    pub(crate) fn are_several(&self) -> bool {
        self.0.is_some()
    }

    /// What is done on rank 0 alone, by whom it writes.
    pub(crate) fn first<T>(&self, make: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
        self.is_first().then(make).transpose()
    }

    /// How long this process has waited for the others so far.
    pub(crate) fn waited(&self) -> Duration {
        self.0.as_ref().map_or(Duration::ZERO, |group| group.waited())
    }

    /// Leaves word of the step that the run is at.
    pub(crate) fn note_step(&self, step: u64) {
        if let Some(group) = &self.0 {
            group.note_step(step);
        }
    }

    /// Tells the others of an error that this process ends with; one that comes of another process is that one's.
    pub(crate) fn told<T>(&self, result: Result<T>) -> Result<T> {
        let Some(group) = &self.0 else { return result };
        result.map_err(|error| {
            let error = group.explain(error);
            group.fail(&error);
            error
        })
    }

    /// Each value as the sum over all processes.
    pub(crate) fn sum(&self, values: &mut [f64]) -> Result<()> {
        if let Some(group) = &self.0 {
            values.copy_from_slice(&group.sum(values)?);
        }
        Ok(())
    }

    /// Whether it is so in any process.
    pub(crate) fn any(&self, is_so: bool) -> Result<bool> {
        self.0.as_ref().map_or(Ok(is_so), |group| group.any(is_so))
    }

    /// What this process found, where every one found something; else the first error of any, in each.
    pub(crate) fn agree<T>(&self, found: Result<T>) -> Result<T> {
        match &self.0 {
            Some(group) => group.agree(found),
            None => found,
        }
    }

    /// The bytes that `make` makes on rank 0, in every process.
    pub(crate) fn of_first(&self, make: impl FnOnce() -> Result<Vec<u8>>) -> Result<Vec<u8>> {
        let Some(group) = &self.0 else { return make() };
        let made = group.agree(self.first(make))?;
        group.broadcast_bytes(&made.unwrap_or_default())
    }

    /// What each has to say, rank after rank.
    pub(crate) fn gather(&self, mine: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        self.0.as_ref().map_or_else(|| Ok(vec![mine.clone()]), |group| group.all_gather_bytes(&mine))
    }

    /// Lists of words as one.
    pub(crate) fn join(&self, mine: Vec<String>) -> Result<Vec<String>> {
        if !self.are_several() {
            return Ok(mine);
        }
        let lists = self.gather(serde_json::to_vec(&mine)?)?;
        let lists = lists.iter().map(|list| Ok(serde_json::from_slice::<Vec<String>>(list)?));
        Ok(lists.collect::<Result<Vec<_>>>()?.concat())
    }

    /// Gives every process the tensors of rank 0, f32.
    pub(crate) fn copy_first(&self, tensors: &[Tensor]) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), |group| broadcast(group, tensors, 0))
    }

    /// The gradients of these parameters, summed over all processes.
    pub(crate) fn gradients(&self, parameters: &[(String, Tensor)]) -> Result<Option<Gradients>> {
        let tensors: Vec<Tensor> = parameters.iter().map(|(_, tensor)| tensor.shallow_clone()).collect();
        self.0.as_ref().map(|group| Gradients::new(group, &tensors)).transpose()
    }

    /// After a step of a [sharded](Optimizer::sharded) optimizer: all parameters in every process.
    pub(crate) fn gather_parameters(&self, optimizer: &Optimizer) -> Result<()> {
        self.0.as_ref().map_or(Ok(()), |group| optimizer.gather_parameters(group))
    }

    /// How a loader asks the others.
    pub(crate) fn peers(&self) -> Option<Box<dyn Peers>> {
        self.0.clone().map(|group| Box::new(Group(group)) as Box<dyn Peers>)
    }

    /// Sees to it that all processes run the same program on the same file.
    pub(crate) fn same_run(&self, config: &TrainConfig) -> Result<()> {
        if !self.are_several() {
            return Ok(());
        }
        let first = self.of_first(|| Ok(serde_json::to_vec(&(VERSION, config))?))?;
        self.agree(compare(self.rank(), &first, config))
    }

    /// Sees to it that all processes found the same; `found` says what of `what`.
    pub(crate) fn same(&self, what: &str, found: &str) -> Result<()> {
        if !self.are_several() {
            return Ok(());
        }
        let all = self.gather(found.as_bytes().to_vec())?;
        match all.iter().enumerate().find(|(_, other)| **other != all[0]) {
            Some((rank, other)) => bail!(
                "rank {rank} sees {what} other than those of rank 0: {}, against {}",
                String::from_utf8_lossy(other),
                String::from_utf8_lossy(&all[0])
            ),
            None => Ok(()),
        }
    }
}

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Compares this process's program and run file with those of rank 0, as it wrote them.
fn compare(rank: usize, first: &[u8], config: &TrainConfig) -> Result<()> {
    let (version, theirs): (String, serde_json::Value) = serde_json::from_slice(first)?;
    ensure!(version == VERSION, "rank {rank} runs version {VERSION} of this program, rank 0 runs {version}");
    let theirs: TrainConfig = serde_json::from_value(theirs)?;
    let differences = theirs.differences(config)?;
    let list = differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    ensure!(list.is_empty(), "the run file of rank {rank} is another than that of rank 0: {list}");
    Ok(())
}

/// A group that a loader asks.
struct Group(Arc<ProcessGroup>);

impl Peers for Group {
    fn all_gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.0.all_gather_bytes(mine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_or_run_file_is_told() {
        let config = TrainConfig::default();
        let error = |version: &str, config: &TrainConfig| {
            let first = serde_json::to_vec(&(version, &TrainConfig::default())).unwrap();
            compare(3, &first, config).map_err(|error| error.to_string())
        };
        assert_eq!(error(VERSION, &config), Ok(()));
        let other = error("0.0.1-other", &config).unwrap_err();
        assert_eq!(other, format!("rank 3 runs version {VERSION} of this program, rank 0 runs 0.0.1-other"));
        let config = TrainConfig { seed: 7, ..config };
        let other = error(VERSION, &config).unwrap_err();
        assert_eq!(other, "the run file of rank 3 is another than that of rank 0: seed was 42, is 7");
    }
}
