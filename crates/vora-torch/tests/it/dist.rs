//! Groups of real processes: each test starts itself again, once for each rank.
#![expect(clippy::print_stdout, reason = "what a process found is read from its output")]

use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use fixtures::{Random, Ranks};
use tch::{Device, Kind, Tensor};
use vora_torch::dist::*;

const LONG: Duration = Duration::from_secs(60);

fn join(timeout: Duration) -> Result<std::sync::Arc<ProcessGroup>> {
    ProcessGroup::join(&World::from_env()?.expect("a rank of a test"), timeout)
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

#[test]
fn all_get_the_same() {
    if !Ranks::is_one() {
        return Ranks::of("dist::all_get_the_same", 0..3, 3, &[]).pass();
    }
    let group = join(LONG).unwrap();
    let rank = group.rank();
    assert_eq!(group.sum(&[1.0, rank as f64]).unwrap(), [3.0, 3.0]);
    assert!(group.any(rank == 2).unwrap() && !group.any(false).unwrap());
    let largest = Tensor::from_slice(&[rank as f32, -(rank as f32)]);
    group.all_reduce(&largest, Op::Max).unwrap();
    assert_eq!(Vec::<f32>::try_from(&largest).unwrap(), [2.0, 0.0]);
    let theirs = Tensor::from_slice(&[rank as i64]);
    group.broadcast(&theirs, 1).unwrap();
    assert_eq!(theirs.int64_value(&[0]), 1);
    let rows = group.all_gather(&Tensor::from_slice(&[rank as i64, 7])).unwrap();
    assert_eq!((rows.size(), Vec::<i64>::try_from(rows.flatten(0, -1)).unwrap()), (vec![3, 2], vec![0, 7, 1, 7, 2, 7]));
    let words = group.all_gather_bytes(&b"abc"[..rank]).unwrap();
    assert_eq!(words, [&b""[..], b"a", b"ab"]);
    assert_eq!(group.broadcast_bytes(if rank == 0 { b"first" } else { b"" }).unwrap(), b"first");
    assert_eq!(group.agree(Ok(rank)).unwrap(), rank);
    let refused = group.agree(if rank == 1 { Err(anyhow!("no such file")) } else { Ok(()) }).unwrap_err().to_string();
    assert_eq!(refused, if rank == 1 { "no such file" } else { "rank 1: no such file" });
    group.barrier().unwrap();
    assert!(group.traffic().all_reduce > 0 && group.traffic().gradients == 0);
}

#[test]
fn a_sharded_weight_is_whole_while_it_is_needed() {
    if !Ranks::is_one() {
        return Ranks::of("dist::a_sharded_weight_is_whole_while_it_is_needed", 0..3, 3, &[]).pass();
    }
    let group = join(LONG).unwrap();
    let (rank, shards) = (group.rank(), Shards::new(&group));
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let weight = Random::new(7).normal([5, 4]).to_kind(kind);
        let sharded = ShardedWeight::new(&weight, &shards);
        assert_eq!((sharded.size(), sharded.num_bytes()), ([5, 4], 7 * kind.elt_size_in_bytes() as u64));
        let before = group.traffic().all_gather;
        ShardedWeight::gather_all(std::iter::once(&sharded));
        for _ in 0..2 {
            assert!(sharded.whole().equal(&weight), "{kind:?}");
        }
        assert_eq!(group.traffic().all_gather - before, 21 * kind.elt_size_in_bytes() as u64);
        sharded.release();
        assert!(sharded.whole().equal(&weight)); // gathered anew, by all
        assert!(group.traffic().all_gather - before > 21 * kind.elt_size_in_bytes() as u64);
    }
    // Passes of one process alone: the others gather along.
    let weights = [0, 1].map(|seed| ShardedWeight::new(&Random::new(seed).normal([2, 3]), &shards));
    let pass = || {
        ShardedWeight::gather_all(weights.iter());
        let whole = weights.each_ref().map(ShardedWeight::whole);
        weights.iter().for_each(ShardedWeight::release);
        whole
    };
    for passes in [[0, 0, 0], [2, 0, 5], [0, 3, 0]] {
        shards.part();
        for _ in 0..passes[rank] {
            shards.begin_pass();
            assert!((0..).zip(pass()).all(|(seed, whole)| whole.equal(&Random::new(seed).normal([2, 3]))));
        }
        shards.meet(|| drop(pass())).unwrap();
    }
    assert!(group.waited() > Duration::ZERO);
    assert!(!group.any(false).unwrap());
}

#[test]
fn nccl_is_opened_where_it_lies_and_says_what_it_lacks() {
    if !Ranks::is_one() {
        return Ranks::of("dist::nccl_is_opened_where_it_lies_and_says_what_it_lacks", 0..1, 1, &[]).pass();
    }
    let nccl = match Nccl::open() {
        Ok(nccl) => nccl,
        Err(error) => {
            let said = format!("{error:#}");
            println!("skipped but for this: {said}");
            assert!(
                said.starts_with("libvora_nccl.so is not in /") && said.contains("cargo xtask setup --cuda"),
                "{said}"
            );
            return;
        }
    };
    let group = join(LONG).unwrap();
    let on_the_host = group.attach(&nccl, Device::Cpu).unwrap_err().to_string();
    assert!(on_the_host.contains("NCCL does not serve Cpu"), "{on_the_host}");
    if tch::Cuda::is_available() {
        group.attach(&nccl, Device::Cuda(0)).unwrap();
        let there = Tensor::from_slice(&[1.5_f32, -2.0]).to_device(Device::Cuda(0));
        group.all_reduce(&there, Op::Sum).unwrap();
        group.broadcast(&there, 0).unwrap();
        let gathered = group.all_gather(&there).unwrap();
        assert_eq!(
            (gathered.size(), Vec::<f32>::try_from(gathered.flatten(0, -1)).unwrap()),
            (vec![1, 2], vec![1.5, -2.0])
        );
    } else {
        let said = format!("{:#}", group.attach(&nccl, Device::Cuda(0)).unwrap_err());
        println!("{said}");
        assert!(
            said.starts_with("NCCL does not serve Cuda(0): libtorch: ") && said.contains("no GPUs found"),
            "{said}"
        );
    }
    // What is on the host goes on as before.
    assert_eq!(group.sum(&[2.0]).unwrap(), [2.0]);
}

/// Two layers, of which the second is reached by some inputs alone, and one that none reaches.
fn parameters() -> Vec<Tensor> {
    let random = Random::new(3);
    [vec![4, 5], vec![5, 5], vec![7]].map(|shape| (random.normal(shape) * 0.3).set_requires_grad(true)).into()
}

fn loss(parameters: &[Tensor], x: &Tensor, is_deep: bool) -> Tensor {
    let hidden = x.matmul(&parameters[0]).tanh();
    let hidden = if is_deep { hidden.matmul(&parameters[1]).tanh() } else { hidden };
    hidden.square().sum(Kind::Float)
}

#[test]
fn gradients_are_those_of_one_process() {
    if !Ranks::is_one() {
        for world_size in [2, 3] {
            Ranks::of("dist::gradients_are_those_of_one_process", 0..world_size, world_size, &[]).pass();
        }
        return;
    }
    let group = join(LONG).unwrap();
    let (rank, world_size) = (group.rank(), group.world_size());
    let (ours, alone) = (parameters(), parameters());
    let gradients = Gradients::new(&group, &ours).unwrap();
    let random = Random::new(5);
    for step in 0..4 {
        // Two passes a step; the second layer is reached by one rank's first pass, by nobody's second, and in one step by none.
        let xs = random.normal([world_size as i64, 2, 3, 4]);
        let is_deep = |rank: usize, pass: i64| step != 2 && rank == 1 && pass == 0;
        for parameter in ours.iter().chain(&alone) {
            let mut gradient = parameter.grad();
            if gradient.defined() {
                let _ = gradient.zero_();
            }
        }
        for pass in 0..2 {
            if pass == 1 {
                gradients.sync_next().unwrap();
            }
            loss(&ours, &xs.get(rank as i64).get(pass), is_deep(rank, pass)).backward();
        }
        gradients.finish().unwrap();
        for other in 0..world_size {
            for pass in 0..2 {
                loss(&alone, &xs.get(other as i64).get(pass), is_deep(other, pass)).backward();
            }
        }
        for (i, (ours, alone)) in ours.iter().zip(&alone).enumerate() {
            let expected = if alone.grad().defined() { alone.grad() } else { alone.zeros_like() };
            let difference = (ours.grad() - &expected).abs().max().double_value(&[]);
            assert!(difference < 1e-5, "step {step}, parameter {i}: {difference}");
            let largest = expected.abs().max().double_value(&[]);
            assert_eq!(largest > 0.0, i == 0 || (i == 1 && step != 2), "parameter {i} of step {step}: {largest}");
            // The same bits everywhere.
            let all = group.all_gather(&ours.grad().contiguous()).unwrap();
            assert!((1..world_size as i64).all(|rank| all.get(rank).equal(&all.get(0))));
        }
    }
    let floats = 4 * 5 + 5 * 5 + 7;
    assert_eq!(group.traffic().gradients, 4 * floats * 5); // four steps and the first pass
}

#[test]
fn processes_with_other_parameters_are_refused() {
    if !Ranks::is_one() {
        return Ranks::of("dist::processes_with_other_parameters_are_refused", 0..2, 2, &[]).pass();
    }
    let group = join(LONG).unwrap();
    let shape = if group.rank() == 0 { [3, 4] } else { [4, 3] };
    let parameter = Tensor::zeros(shape, (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let error = Gradients::new(&group, &[parameter]).unwrap_err();
    group.fail(&error);
    assert!(group.rank() == 0 || error.to_string().contains("appears not to match"), "{error}");
}

#[test]
fn who_does_not_come_is_named() {
    if !Ranks::is_one() {
        let outputs = Ranks::of("dist::who_does_not_come_is_named", 0..2, 4, &[]).wait();
        for (rank, output) in outputs.iter().enumerate() {
            let said = said(output);
            assert!(
                said.contains("2 of 4 processes came within 2 s, ddp_timeout; missing: rank 2, 3"),
                "{rank}: {said}"
            );
        }
        return;
    }
    println!("{:#}", join(Duration::from_secs(2)).unwrap_err());
}

#[test]
fn a_rank_that_is_there_twice_and_a_port_in_use_are_told() {
    let test = "dist::a_rank_that_is_there_twice_and_a_port_in_use_are_told";
    if Ranks::is_one() {
        println!("{:#}", join(Duration::from_secs(4)).unwrap_err());
        return;
    }
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let outputs = Ranks::of(test, 0..2, 2, &[("MASTER_PORT", &port)]).wait();
    let told = [format!("port {port} is in use on this machine"), format!("no store answers at 127.0.0.1:{port}")];
    for (output, told) in outputs.iter().zip(told) {
        assert!(said(output).contains(&told), "{}", said(output));
    }
    let port = fixtures::free_port().to_string();
    let first = Ranks::of(test, 0..2, 3, &[("MASTER_PORT", &port)]);
    let second = Ranks::of(test, 1..2, 3, &[("MASTER_PORT", &port)]);
    let outputs = [first.wait(), second.wait()].concat();
    let twice = outputs.iter().filter(|output| said(output).contains("there is another process of rank 1"));
    assert_eq!(twice.count(), 1, "{}", outputs.iter().map(said).collect::<String>());
}

/// What the other ranks say of rank 1, which comes to its end in its own way.
fn told(test: &str, by_itself: bool, end: impl FnOnce(&Ranks)) -> Vec<String> {
    let ranks = Ranks::of(&format!("dist::{test}"), 0..3, 3, &[]);
    let start = Instant::now();
    end(&ranks);
    let mut outputs = Vec::new();
    if by_itself {
        outputs = ranks.wait();
    } else {
        // Rank 1 is frozen: whoever started it ends it, once the others have ended.
        let pids = [0, 2].map(|rank| ranks.id(rank));
        while pids.iter().any(|pid| is_running(*pid)) {
            assert!(start.elapsed() < Duration::from_secs(40), "the others did not stop");
            std::thread::sleep(Duration::from_millis(100));
        }
        // SAFETY: a signal to a child of ours.
        unsafe { libc::kill(ranks.id(1) as i32, libc::SIGKILL) };
        outputs.extend(ranks.wait());
    }
    assert!(start.elapsed() < Duration::from_secs(35), "{:?}", start.elapsed());
    [0, 2].map(|rank: usize| said(&outputs[rank])).into()
}

/// Whether a child still runs: one that has ended is a zombie until it is waited for.
fn is_running(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with('Z'))
}

/// Goes on until a collective fails, and says why.
fn until_it_fails(at_step: impl Fn(u64, &ProcessGroup) -> Result<()>) {
    let group = join(LONG).unwrap();
    for step in 0.. {
        group.note_step(step);
        let result = at_step(step, &group).and_then(|()| group.sum(&[1.0]));
        if let Err(error) = result {
            group.fail(&error);
            println!("ended: {error:#}");
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_rank_that_is_killed_is_named() {
    if Ranks::is_one() {
        return until_it_fails(|step, group| {
            if step == 50 && group.rank() == 1 {
                std::process::abort();
            }
            Ok(())
        });
    }
    for said in told("a_rank_that_is_killed_is_named", true, |_| {}) {
        assert!(said.contains("ended: rank 1 has not been heard of for 5 s at step"), "{said}");
    }
}

#[test]
fn a_rank_that_is_frozen_is_named() {
    if Ranks::is_one() {
        return until_it_fails(|step, group| {
            if step == 50 && group.rank() == 1 {
                // SAFETY: a signal to this process.
                unsafe { libc::raise(libc::SIGSTOP) };
            }
            Ok(())
        });
    }
    for said in told("a_rank_that_is_frozen_is_named", false, |_| {}) {
        assert!(said.contains("ended: rank 1 has not been heard of for 15 s at step"), "{said}");
    }
}

#[test]
fn the_keeper_of_the_store_frozen_is_named() {
    if Ranks::is_one() {
        return until_it_fails(|step, group| {
            if step == 50 && group.rank() == 0 {
                // SAFETY: a signal to this process.
                unsafe { libc::raise(libc::SIGSTOP) };
            }
            Ok(())
        });
    }
    let ranks = Ranks::of("dist::the_keeper_of_the_store_frozen_is_named", 0..3, 3, &[]);
    let start = Instant::now();
    while [1, 2].iter().any(|rank| is_running(ranks.id(*rank))) {
        assert!(start.elapsed() < Duration::from_secs(40), "the others did not stop");
        std::thread::sleep(Duration::from_millis(100));
    }
    // SAFETY: a signal to a child of ours.
    unsafe { libc::kill(ranks.id(0) as i32, libc::SIGKILL) };
    for output in &ranks.wait()[1..] {
        assert!(said(output).contains("ended: rank 0"), "{}", said(output));
    }
}

#[test]
fn a_rank_that_fails_tells_why() {
    if Ranks::is_one() {
        return until_it_fails(
            |step, group| if step == 20 && group.rank() == 1 { bail!("the disk is full") } else { Ok(()) },
        );
    }
    for said in told("a_rank_that_fails_tells_why", true, |_| {}) {
        assert!(said.contains("ended: rank 1: the disk is full"), "{said}");
    }
}

#[test]
fn a_rank_that_is_late_is_named() {
    if Ranks::is_one() {
        let group = join(Duration::from_secs(4)).unwrap();
        group.note_step(3);
        if group.rank() == 1 {
            std::thread::sleep(Duration::from_secs(9));
        }
        println!("ended: {:#}", group.barrier().unwrap_err());
        return;
    }
    for said in told("a_rank_that_is_late_is_named", true, |_| {}) {
        assert!(said.contains("4 s, ddp_timeout, for the others: rank 1 (at step 3)"), "{said}");
    }
}
