//! What the libraries of a program read of its environment before its `main`.

/// A variable, its value, and the variables by which a user has said otherwise.
struct Entry {
    name: &'static str,
    value: &'static str,
    said_by: &'static [&'static str],
}

/// What a program computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Workload {
    /// Training steps, whose tensors come and go.
    Training,
    /// Answers, for which weights are loaded once and little is asked for afterwards.
    Answering,
}

/// Rounds that an OpenMP thread waits awake for work. libgomp's own 300 000 starve the thread that is waited for where other
/// processes want the cores; beside two of them a training step took some 25 times as long.
const SPINS: Entry = Entry { name: "GOMP_SPINCOUNT", value: "10000", said_by: &["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"] };

/// glibc gives every tensor above 128 KiB pages of its own and takes them back with it: a step of the default recipe met 18,000
/// page faults. Kept and in huge pages it meets ten, for 2% more memory at the peak, and takes a tenth less time.
const TRAINING: Entry = Entry {
    name: "GLIBC_TUNABLES",
    value: "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1073741824:\
            glibc.malloc.top_pad=67108864",
    said_by: &["GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"],
};

/// Kept, but as little as is asked for: of a model of 135 million weights in 8 bits the huge pages were 60 MiB, a sixth of all,
/// and made a token 4% faster.
const ANSWERING: Entry =
    Entry { value: "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1073741824", ..TRAINING };

/// Variables with which a program that computes on a CPU should start, beside those of its environment: how long libgomp's
/// threads wait awake, and how glibc keeps memory. None that the user has set, or said otherwise of.
///
/// Libraries read them when they are loaded, before `main`: a program that finds some missing starts itself again with them, as
/// `vora` does, or is started with them.
pub fn missing_environment(workload: Workload) -> impl Iterator<Item = (&'static str, &'static str)> {
    let is_missing = |entry: &Entry| entry.said_by.iter().all(|name| std::env::var_os(name).is_none());
    let malloc = match workload {
        Workload::Training => TRAINING,
        Workload::Answering => ANSWERING,
    };
    [SPINS, malloc].into_iter().filter(is_missing).map(|entry| (entry.name, entry.value))
}
