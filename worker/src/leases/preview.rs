//! What a worker would do about the peers of its servers, by what it has on disk. It changes nothing.

use std::collections::BTreeMap;
use std::time::Instant;

use wgkex_common::Config;
use wgkex_common::storage::StorageError;
use wgkex_kernel::Kernel;

use super::file;
use super::server::{ServerState, sources};
use crate::dry_run::{Command, Planned, Reason, commands};
use crate::plan::{Action, changes};

/// The commands for each server, by name; or why its interface cannot be read.
pub async fn preview(
    config: &Config,
    kernel: &mut impl Kernel,
) -> Result<BTreeMap<String, Result<Vec<Command>, String>>, StorageError> {
    let mut kept = file::read(&file::path(&config.state_dir))?.servers;
    let mut previews = BTreeMap::new();
    for (name, source) in sources(config) {
        let kept = kept.remove(&name).unwrap_or_default();
        let mut state = ServerState::new(name.clone(), source, kept, Instant::now());
        let interface = state.interface.clone();
        let device = kernel.read(&interface).await.map_err(|error| error.to_string());
        let commands = device.map(|device| {
            let steps = state.plan(&device).steps;
            let planned = steps.into_iter().map(|step| {
                let reason = if matches!(step.action, Action::Remove(_)) { Reason::Unleased } else { Reason::Missing };
                Planned { reason, changes: changes(&[step]) }
            });
            commands(&interface, &device, &planned.collect::<Vec<_>>())
        });
        previews.insert(name, commands);
    }
    Ok(previews)
}
