//! An in-memory kernel with configured delays, which counts the keys whose objects are complete in it.

use std::collections::HashSet;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use wgkex_common::Domain;
use wgkex_kernel::memory::{Delays, MemoryKernel};
use wgkex_kernel::{Change, Device, Interface, Kernel, KernelError, Outcomes};

/// The in-memory kernel of `wgkex-worker`, with a count of flood entries.
pub struct Counted {
    memory: MemoryKernel,
    flooded: HashSet<(Interface, Ipv6Addr)>,
    count: Arc<AtomicU32>,
}

impl Counted {
    /// Empty interfaces of `domains`.
    pub fn new(domains: &[Domain], delays: Delays) -> Self {
        let memory = MemoryKernel::with(domains);
        memory.delay(delays);
        Self { memory, flooded: HashSet::new(), count: Arc::default() }
    }

    /// The number of entries in the flood lists; the flood entry is the last object that a worker sets for a key.
    pub fn count(&self) -> Arc<AtomicU32> {
        self.count.clone()
    }
}

impl Kernel for Counted {
    async fn read(&mut self, interface: &Interface) -> Result<Device, KernelError> {
        self.memory.read(interface).await
    }

    async fn apply(&mut self, interface: &Interface, changes: Vec<Change>) -> Outcomes {
        let outcomes = self.memory.apply(interface, changes).await;
        // The in-memory kernel would keep all of them.
        let _ = self.memory.take_applies();
        for outcome in &outcomes {
            if let (Change::AddFdb(address), Ok(())) = outcome {
                self.flooded.insert((interface.clone(), *address));
            }
        }
        self.count.store(u32::try_from(self.flooded.len()).unwrap_or(u32::MAX), Ordering::Relaxed);
        outcomes
    }

    async fn changed(&mut self) {
        self.memory.changed().await;
    }
}
