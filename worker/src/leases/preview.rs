//! The changes that a worker would make to the peers of its servers, by its state on disk. Nothing is changed.

use std::collections::BTreeMap;
use std::time::Instant;

use wgkex_common::Config;
use wgkex_common::storage::StorageError;
use wgkex_kernel::{Device, Interface, Kernel};

use super::file;
use super::server::{ServerState, sources};
use crate::plan::{Action, Planned, Reason};

/// The changes that a worker would make for a server.
#[derive(Debug)]
pub struct ServerPreview {
    /// Its interface.
    pub interface: Interface,
    /// The tables of the interface.
    pub device: Device,
    /// The planned changes.
    pub planned: Vec<Planned>,
}

/// The preview of each server, by name; or the error of reading its interface.
pub async fn preview(
    config: &Config,
    kernel: &mut impl Kernel,
) -> Result<BTreeMap<String, Result<ServerPreview, String>>, StorageError> {
    let mut stored = file::read(&file::path(&config.state_dir))?.servers;
    let mut previews = BTreeMap::new();
    for (name, source) in sources(config) {
        let stored = stored.remove(&name).unwrap_or_default();
        let mut state = ServerState::new(name.clone(), source, stored, Instant::now());
        let interface = state.interface.clone();
        let device = kernel.read(&interface).await.map_err(|error| error.to_string());
        let preview = device.map(|device| {
            let reason = |action| if matches!(action, Action::Remove(_)) { Reason::Unleased } else { Reason::Missing };
            let steps = state.plan(&device).steps;
            let planned = steps.iter().map(|step| Planned::of(reason(step.action), step)).collect();
            ServerPreview { interface, device, planned }
        });
        previews.insert(name, preview);
    }
    Ok(previews)
}
