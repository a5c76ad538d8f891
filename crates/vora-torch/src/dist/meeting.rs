//! How processes find each other in a store that may still hold what those before them left there: torchrun's agents keep it
//! over restarts, and count those each for itself.

use std::time::{Duration, Instant, SystemTime};
use std::{process, thread};

use anyhow::{Result, bail, ensure};

use super::store::Store;
use super::watch::{END, beat};
use super::world::World;

/// The name of the attempt that is under way, by which its keys begin.
const ATTEMPT: &str = "attempt";

/// Set once all have come.
const ALL_HERE: &str = "all here";

/// Between two looks; rank 0 leaves a sign of life at each.
const PAUSE: Duration = Duration::from_millis(200);

/// A rank 0 that leaves no sign for so long belonged to an attempt before.
const SILENCE: Duration = Duration::from_secs(3);

/// Waits until all ranks have come, and gives the name of their attempt. Rank 0 makes it up, and counts the others.
pub(super) fn meet(store: &Store, world: &World, timeout: Duration) -> Result<String> {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos();
    let mine = format!("{since_1970:x}-{:x}", process::id());
    if world.rank == 0 { call(store, world, mine, timeout) } else { follow(store, world, &mine, timeout) }
}

fn call(store: &Store, world: &World, mine: String, timeout: Duration) -> Result<String> {
    let before = store.swap(ATTEMPT, "", &mine)?;
    if before != mine {
        let start = Instant::now();
        let sign = store.look(&format!("{before}/{}", beat(0)))?;
        while start.elapsed() < SILENCE {
            ensure!(store.look(&format!("{before}/{}", beat(0)))? == sign, twice(0));
            thread::sleep(PAUSE);
        }
        ensure!(store.swap(ATTEMPT, &before, &mine)? == mine, twice(0));
    }
    let attempt = store.within(&mine)?;
    let (start, mut missing) = (Instant::now(), (1..world.world_size).collect::<Vec<_>>());
    for sign in 1.. {
        attempt.set(&beat(0), format!("{sign} 0 0").as_bytes())?;
        let mut left = Vec::new();
        for rank in missing {
            if !attempt.has(&here(rank))? {
                left.push(rank);
            }
        }
        missing = left;
        if missing.is_empty() {
            attempt.set(ALL_HERE, b"")?;
            break;
        }
        if start.elapsed() >= timeout {
            let who = missing.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let reason = format!(
                "{} of {} processes came within {} s, ddp_timeout; missing: rank {who}",
                world.world_size - missing.len(),
                world.world_size,
                timeout.as_secs()
            );
            attempt.set(END, reason.as_bytes())?;
            for more in 1..=5 {
                attempt.set(&beat(0), format!("{} 0 0", sign + more).as_bytes())?;
                thread::sleep(PAUSE); // until the others have read it
            }
            bail!(reason);
        }
        thread::sleep(PAUSE);
    }
    Ok(mine)
}

fn follow(store: &Store, world: &World, mine: &str, timeout: Duration) -> Result<String> {
    let start = Instant::now();
    let (mut last, mut has_claimed) = ((None, None), false);
    // Rank 0 knows who is missing, so the others give it the time to say so.
    while start.elapsed() < timeout.saturating_add(10 * PAUSE) {
        let name = store.look(ATTEMPT)?;
        let sign = name.as_ref().map(|name| store.look(&format!("{name}/{}", beat(0)))).transpose()?.flatten();
        let (last_name, last_sign) = std::mem::replace(&mut last, (name.clone(), sign.clone()));
        has_claimed &= last_name == name;
        // An attempt whose rank 0 leaves no signs is one of before.
        if let Some(name) = name.filter(|name| last_name.as_ref() == Some(name) && last_sign != sign) {
            let attempt = store.within(&name)?;
            if !has_claimed {
                ensure!(attempt.swap(&here(world.rank), "", mine)? == mine, twice(world.rank));
                has_claimed = true;
            }
            if let Some(reason) = attempt.look(END)? {
                bail!(reason);
            }
            if attempt.has(ALL_HERE)? {
                return Ok(name);
            }
        }
        thread::sleep(PAUSE);
    }
    bail!("rank 0 did not come within {} s, ddp_timeout", timeout.as_secs());
}

fn here(rank: usize) -> String {
    format!("here/{rank}")
}

fn twice(rank: usize) -> String {
    format!("there is another process of rank {rank}: each needs a RANK of its own")
}
