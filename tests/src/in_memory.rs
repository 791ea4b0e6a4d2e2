//! A real worker in this process, on a kernel in memory.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use tokio::runtime;
use tokio::sync::oneshot;
use wgkex_common::{Config, PublicKey};
use wgkex_kernel::memory::MemoryKernel;
use wgkex_kernel::{Change, Interface, PeerConfig};

use crate::stack::{Stack, free_address};

/// A worker that runs until this value is dropped.
pub struct InMemory {
    /// Its kernel.
    pub kernel: MemoryKernel,
    /// The address of its metrics.
    pub http: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl InMemory {
    /// Starts the worker `name` on the bus of `stack`, for all its domains.
    #[must_use]
    pub fn start(stack: &Stack, name: &str) -> Self {
        Self::start_by(stack, name, "", "")
    }

    /// The same with these lines of YAML, too.
    #[must_use]
    pub fn start_with(stack: &Stack, name: &str, config: &str) -> Self {
        Self::start_by(stack, name, "", config)
    }

    /// The same with more in `mqtt`, as keys of a YAML mapping that begin with a comma.
    #[must_use]
    pub fn start_as(stack: &Stack, name: &str, mqtt: &str) -> Self {
        Self::start_by(stack, name, mqtt, "")
    }

    /// The same as a server of the registry, with its interface; `settings` is the YAML mapping of the server.
    #[must_use]
    pub fn start_server(stack: &Stack, name: &str, server: &str, settings: &str) -> Self {
        Self::start_by(
            stack,
            name,
            "",
            &format!(
                "servers: {{{server}: {settings}}}
"
            ),
        )
    }

    fn start_by(stack: &Stack, name: &str, mqtt: &str, more: &str) -> Self {
        let http = free_address();
        let yaml = format!(
            "domains: [{}]\ndomain_prefixes: [ffx_]\nstate_dir: {}\nworker_listen: \"{}\"\n\
             mqtt: {{broker_url: {}, broker_port: {}{mqtt}}}\n{more}",
            stack.plan.domains.join(", "),
            stack.dir().join(name).display(),
            http,
            stack.mqtt.ip(),
            stack.mqtt.port(),
        );
        let config = Config::parse("test", &yaml, name).expect("a config");
        let kernel = MemoryKernel::with(&config.domains.iter().cloned().collect::<Vec<_>>());
        for server in config.servers.values() {
            kernel.add(Interface { name: server.interface.clone(), vxlan: None });
        }
        let (stop, stopped) = oneshot::channel::<()>();
        let worker = kernel.clone();
        let thread = thread::spawn(move || {
            let runtime = runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            let _ = runtime.expect("a runtime").block_on(wgkex_worker::run(
                config,
                worker.clone(),
                move || Ok(worker),
                async {
                    let _ = stopped.await;
                },
            ));
        });
        Self { kernel, http, stop: Some(stop), thread: Some(thread) }
    }

    /// The keys of the peers of a server's interface.
    #[must_use]
    pub fn peers(&self, interface: &str) -> BTreeSet<String> {
        let device = self.kernel.device(Interface { name: interface.into(), vxlan: None });
        device.into_iter().flat_map(|device| device.peers.into_keys()).map(|key| key.to_string()).collect()
    }

    /// Whether these changes set the peer of this key.
    #[must_use]
    pub fn took(applied: &[Change], key: &str) -> bool {
        let key: PublicKey = key.parse().expect("a key");
        applied.contains(&Change::SetPeer(PeerConfig::at(key, key.link_local())))
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        self.stop = None;
        // The worker publishes its offline status, if the MQTT server still runs.
        let (joined, is_joined) = mpsc::channel();
        if let Some(thread) = self.thread.take() {
            thread::spawn(move || joined.send(thread.join().is_ok()));
            let _ = is_joined.recv_timeout(crate::DEADLINE);
        }
    }
}
