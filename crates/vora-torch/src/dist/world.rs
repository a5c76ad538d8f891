//! Which process of how many this one is, as its environment says.

use std::str::FromStr;

use anyhow::{Context, Result, ensure};

/// Without these there is no meeting.
const NEEDED: [&str; 4] = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"];

/// A process's place among those that train together: what `torchrun` and whoever else starts them says in the environment.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct World {
    /// `RANK`: this process among all, from 0.
    pub rank: usize,
    /// `WORLD_SIZE`: how many there are.
    pub world_size: usize,
    /// `LOCAL_RANK`: this process among those of its machine; 0 where it is not set.
    pub local_rank: usize,
    /// `LOCAL_WORLD_SIZE`: how many of them are on this machine; 1 where it is not set.
    pub local_world_size: usize,
    /// `MASTER_ADDR`: the machine of rank 0.
    pub master_addr: String,
    /// `MASTER_PORT`: where the store listens there.
    pub master_port: u16,
    /// `TORCHELASTIC_USE_AGENT_STORE`: the store is kept by torchrun's agent, in place of rank 0.
    pub has_agent_store: bool,
}

impl World {
    /// Reads the environment; none where it says nothing of other processes.
    ///
    /// # Errors
    /// Names the variables that are missing where others are set, and one that is no number or out of its range.
    pub fn from_env() -> Result<Option<Self>> {
        Self::parse(|name| std::env::var(name).ok())
    }

    fn parse(value: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let (set, missing): (Vec<_>, Vec<_>) = NEEDED.into_iter().partition(|name| value(name).is_some());
        if set.is_empty() {
            return Ok(None);
        }
        ensure!(
            missing.is_empty(),
            "{} set, but not {}: torchrun sets all of them for each of its processes; without any of them one process \
             trains alone",
            set.join(", ") + if set.len() == 1 { " is" } else { " are" },
            missing.join(", ")
        );
        let world = Self {
            rank: number(&value, "RANK", None)?,
            world_size: number(&value, "WORLD_SIZE", None)?,
            local_rank: number(&value, "LOCAL_RANK", Some(0))?,
            local_world_size: number(&value, "LOCAL_WORLD_SIZE", Some(1))?,
            master_addr: value("MASTER_ADDR").unwrap_or_default(),
            master_port: number(&value, "MASTER_PORT", None)?,
            has_agent_store: value("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True"),
        };
        let Self { rank, world_size, local_rank, local_world_size, .. } = world;
        ensure!(rank < world_size, "RANK is {rank} and WORLD_SIZE {world_size}: ranks count from 0");
        ensure!(
            local_rank < local_world_size && local_world_size <= world_size,
            "LOCAL_RANK is {local_rank}, LOCAL_WORLD_SIZE {local_world_size}, WORLD_SIZE {world_size}: local ranks count \
             from 0, and no machine has more processes than there are"
        );
        ensure!(!world.master_addr.is_empty(), "MASTER_ADDR is empty; it names the machine of rank 0");
        Ok(Some(world))
    }

    /// Whether all processes are on one machine.
    pub fn is_on_one_machine(&self) -> bool {
        self.local_world_size == self.world_size
    }
}

fn number<T: FromStr>(value: impl Fn(&str) -> Option<String>, name: &str, default: Option<T>) -> Result<T> {
    match (value(name), default) {
        (None, Some(default)) => Ok(default),
        (text, _) => {
            let text = text.unwrap_or_default();
            text.trim().parse().ok().with_context(|| format!("{name} is `{text}`, which is no number that fits there"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(variables: &[(&str, &str)]) -> Result<Option<World>> {
        World::parse(|name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    const FOUR: [(&str, &str); 4] =
        [("RANK", "3"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "node-0"), ("MASTER_PORT", "29500")];

    #[test]
    fn an_environment_of_torchrun_and_none() {
        assert_eq!(parse(&[("HOME", "/")]).unwrap(), None);
        let plain = parse(&FOUR).unwrap().unwrap();
        assert_eq!((plain.rank, plain.world_size, plain.local_rank, plain.local_world_size), (3, 4, 0, 1));
        assert!(!plain.has_agent_store && !plain.is_on_one_machine());
        let elastic = [("LOCAL_RANK", "3"), ("LOCAL_WORLD_SIZE", "4"), ("TORCHELASTIC_USE_AGENT_STORE", "True")];
        let found = parse(&[&FOUR[..], &elastic].concat()).unwrap().unwrap();
        assert!(found.has_agent_store && found.is_on_one_machine());
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let error = |variables: &[(&str, &str)]| parse(variables).unwrap_err().to_string();
        let without = error(&[FOUR[0], FOUR[1], FOUR[3]]);
        assert!(without.starts_with("RANK, WORLD_SIZE, MASTER_PORT are set, but not MASTER_ADDR:"), "{without}");
        let one = error(&FOUR[2..3]);
        assert!(one.starts_with("MASTER_ADDR is set, but not RANK, WORLD_SIZE, MASTER_PORT"), "{one}");
        let with = |name: &'static str, value: &'static str| {
            error(&FOUR.map(|(key, old)| (key, if key == name { value } else { old })))
        };
        assert!(with("RANK", "4").contains("RANK is 4 and WORLD_SIZE 4"));
        assert!(with("RANK", "-1").contains("RANK is `-1`, which is no number"));
        assert!(with("MASTER_PORT", "70000").contains("MASTER_PORT is `70000`"));
        assert!(with("MASTER_ADDR", "").contains("MASTER_ADDR is empty"));
        assert!(error(&[&FOUR[..], &[("LOCAL_RANK", "1")]].concat()).contains("LOCAL_RANK is 1, LOCAL_WORLD_SIZE 1"));
    }
}
