//! Debian's NATS server, alone or as a cluster that stores MQTT's messages on all nodes, and one address for programs:
//! it leads to the first node that accepts connections, as a name with several addresses does.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use rumqttc::{Connect, ConnectReturnCode, Packet, QoS, Subscribe, SubscribeReasonCode};

use crate::process::Process;
use crate::proxy::{Proxy, ProxyMode};
use crate::raw_client::RawClient;
use crate::stack::free_address;
use crate::wait_within;

/// How long nodes may take to agree, on a busy machine.
const AGREED: Duration = Duration::from_secs(120);

/// A cluster that runs.
pub struct Cluster {
    nodes: Vec<Node>,
    /// The address for programs.
    address: SocketAddr,
    _entrance: Proxy,
}

struct Node {
    mqtt: SocketAddr,
    config: PathBuf,
    process: Process,
}

impl Cluster {
    /// Starts one of so many nodes with their files below `dir`, and waits until each serves.
    #[must_use]
    pub fn start(dir: &Path, nodes: usize) -> Self {
        let routes: Vec<_> = (0..nodes).map(|_| free_address()).collect();
        let nodes: Vec<_> = (0..nodes).map(|n| Node::start(dir, n, &routes)).collect();
        let (address, servers) = (free_address(), nodes.iter().map(|node| node.mqtt).collect());
        let cluster = Self { nodes, address, _entrance: Proxy::start(address, servers, ProxyMode::Good) };
        cluster.wait_until_it_serves();
        cluster
    }

    /// The address for programs.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends a node at once.
    pub fn kill(&mut self, node: usize) {
        let _ = self.nodes[node].process.end_by(Signal::SIGKILL);
    }

    /// Starts a node again that was killed, with what it has on disk. Does not wait.
    pub fn start_again(&mut self, node: usize) {
        self.nodes[node].process = start(node, &self.nodes[node].config);
    }

    /// Waits until every node serves.
    pub fn wait_until_it_serves(&self) {
        for (n, node) in self.nodes.iter().enumerate() {
            wait_within(AGREED, &format!("node {n} serves"), || serves(node.mqtt, n).then_some(()));
        }
    }
}

impl Node {
    fn start(dir: &Path, n: usize, routes: &[SocketAddr]) -> Self {
        let (mqtt, dir) = (free_address(), dir.join(format!("nats{n}")));
        std::fs::create_dir_all(&dir).expect("a directory");
        let config = dir.join("nats.conf");
        std::fs::write(&config, example(n, mqtt, &dir, routes)).expect("write its config");
        let process = start(n, &config);
        Self { mqtt, config, process }
    }
}

/// deploy/examples/nats.conf for one of the nodes that reach each other by `routes`.
fn example(n: usize, mqtt: SocketAddr, dir: &Path, routes: &[SocketAddr]) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/nats.conf");
    let mut text = std::fs::read_to_string(file).expect("the example");
    if routes.len() == 1 {
        text.truncate(text.find("\ncluster {").expect("a section for clusters"));
    }
    let others = ["nats://nats1.example.org:6222", "nats://nats2.example.org:6222", "nats://nats3.example.org:6222"];
    let places = [
        ("server_name: n1".to_owned(), format!("server_name: n{n}")),
        ("127.0.0.1:4222".to_owned(), free_address().to_string()),
        ("/var/lib/nats".to_owned(), dir.display().to_string()),
        ("0.0.0.0:1883".to_owned(), mqtt.to_string()),
        ("0.0.0.0:6222".to_owned(), routes[n].to_string()),
        ("stream_replicas: 3".to_owned(), format!("stream_replicas: {}", routes.len())),
        (
            others.join("\", \""),
            routes.iter().map(|route| format!("nats://{route}")).collect::<Vec<_>>().join("\", \""),
        ),
    ];
    for (place, here) in places {
        assert!(text.contains(&place) || routes.len() == 1, "nats.conf has no {place}");
        text = text.replace(&place, &here);
    }
    text
}

fn start(node: usize, config: &Path) -> Process {
    let program = ["/usr/sbin/nats-server", "/usr/bin/nats-server"].map(Path::new);
    let program = program.into_iter().find(|path| path.exists());
    let program = program.expect("NATS is missing: apt-get install nats-server");
    // It ends with the test, also when that is killed.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(program).arg("-c").arg(config);
    Process::start(&format!("nats{node}"), &mut command)
}

/// Whether the node accepts a client and grants its subscription. A node that has not found the others refuses.
fn serves(node: SocketAddr, n: usize) -> bool {
    if TcpStream::connect(node).is_err() {
        return false;
    }
    let connect = Connect { clean_session: true, ..Connect::new(format!("test{n}")) };
    let (mut raw, code) = RawClient::try_connect(node, &connect);
    raw.send(&Packet::Subscribe(Subscribe { pkid: 1, ..Subscribe::new("test/+", QoS::AtLeastOnce) }));
    let granted = [SubscribeReasonCode::Success(QoS::AtLeastOnce)];
    code == Some(ConnectReturnCode::Success)
        && matches!(raw.read(), Some(Packet::SubAck(ack)) if ack.return_codes == granted)
}
