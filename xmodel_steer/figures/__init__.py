"""Plotly figures, as values, and the report. Nothing is computed that is not in a record."""

from xmodel_steer.figures.doses import dose_response as dose_response
from xmodel_steer.figures.doses import frontier as frontier
from xmodel_steer.figures.geometry import mapped_scatter as mapped_scatter
from xmodel_steer.figures.geometry import vector_geometry as vector_geometry
from xmodel_steer.figures.layers import data_curve as data_curve
from xmodel_steer.figures.layers import effect_by_layer as effect_by_layer
from xmodel_steer.figures.layers import layer_grid as layer_grid
from xmodel_steer.figures.layers import patching as patching
from xmodel_steer.figures.pairing import AlignmentView as AlignmentView
from xmodel_steer.figures.pairing import ProjectionView as ProjectionView
from xmodel_steer.figures.pairing import show_alignment as show_alignment
from xmodel_steer.figures.pairing import show_projection as show_projection
from xmodel_steer.figures.report import figures_html as figures_html
from xmodel_steer.figures.report import marked as marked
from xmodel_steer.figures.report import summary as summary
from xmodel_steer.figures.report import table as table
from xmodel_steer.figures.report import write_report as write_report
from xmodel_steer.figures.style import COLOURS as COLOURS
from xmodel_steer.figures.style import DASHES as DASHES
from xmodel_steer.figures.style import interval as interval
from xmodel_steer.figures.style import laid_out as laid_out
